"""Loads models in a daemon thread, so that an abandoned load blocks neither its caller nor the exit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import thread as executors
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def load_aside(load: Callable[[], T]) -> T:
    """Return the result of `load`, run in a daemon thread; if cancelled, return at once while `load` goes on.

    An executor's thread would not do: the interpreter waits for those before it exits.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(settle: Callable[[], None]) -> None:
        if not future.done():
            settle()

    def run() -> None:
        try:
            settle = partial(future.set_result, load())
        except BaseException as exc:  # noqa: BLE001 - handed to the one who waits
            settle = partial(future.set_exception, exc)
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, settle)

    threading.Thread(target=run, name="qvl-load", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        _let_go()
        raise


def _let_go() -> None:
    """Unregister the executors that `load` made (the hub's client has one), whose threads would be joined at exit."""
    for worker in list(getattr(executors, "_threads_queues", ())):
        if worker.daemon:
            del executors._threads_queues[worker]  # type: ignore[attr-defined]
