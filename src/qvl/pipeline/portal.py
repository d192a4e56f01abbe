"""The event loop thread that runs the blocking calls of a Pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Generic, ParamSpec, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from qvl.errors import ConfigError
from qvl.log import logger
from qvl.pipeline.executor import Executor
from qvl.pipeline.single_flight import CLOSE_SECONDS

P = ParamSpec("P")
R = TypeVar("R")
log = logger("qvl.pipeline")

# The backend, the work under way, and the cache, each of which has its own bound.
CLOSING = 3 * CLOSE_SECONDS


class _Loop:
    """The event loop of one Pipeline, in a thread started by the first call."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        self._claimed = self._forked = False
        _loops.add(self)

    def call(self, function: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the result of the async `function`, run on the event loop; Ctrl-C while waiting cancels it."""
        portal = self._running()
        work = _Work(partial(function, *args, **kwargs))
        future: Future[R] | None = None
        try:
            # Ctrl-C may come before there is a future to cancel, when the work has begun already.
            future = portal.start_task_soon(work.run)
            return future.result()
        except BaseException:
            if future is None or not future.done():
                with contextlib.suppress(RuntimeError):
                    portal.start_task_soon(work.cancel)
            raise

    def end(self, items: AsyncGenerator[object, None]) -> None:
        """Close an async generator that `call` has iterated, if it is still open."""
        portal = self._portal
        if portal is None:
            return
        # It may be ending already, because the wait for its next item was interrupted or the loop is being closed.
        with contextlib.suppress(RuntimeError):
            portal.call(items.aclose)

    def close(self) -> None:
        """Close the pipeline and end the thread; calling it twice is harmless."""
        with self._lock:
            portal, thread = self._portal, self._thread
            self._portal = self._thread = None
        if portal is None or thread is None:
            if self._executor.store is not None:
                self._executor.store.close()
        elif thread is threading.current_thread():
            # The garbage collector runs anywhere, and this thread cannot wait for itself.
            threading.Thread(target=self._stop, args=(portal, thread), name="qvl-close").start()
        else:
            self._stop(portal, thread)

    def _stop(self, portal: BlockingPortal, thread: threading.Thread) -> None:
        try:
            portal.start_task_soon(self._executor.aclose).result(timeout=CLOSING)
        except FutureTimeoutError:
            log.warning("the pipeline did not close in time and is abandoned", seconds=CLOSING)
        finally:
            # Not waited for: a loop that something keeps from turning would never answer.
            portal.start_task_soon(portal.stop)
            thread.join(timeout=10)

    def claim(self) -> None:
        """Make this process the owner of the pipeline.

        Raises:
            ConfigError: it was used before a fork; its threads do not exist in the child and may hold locks.
        """
        if self._forked:
            raise ConfigError("a pipeline cannot be used after a fork", hint="create one in each process")
        self._claimed = True

    def _running(self) -> BlockingPortal:
        with self._lock:
            self.claim()
            if self._portal is None:
                ready: Future[BlockingPortal] = Future()
                # A daemon, because a program that forgets close() must still end; the finalizer closes it in order.
                self._thread = threading.Thread(target=_serve_portal, args=(ready,), name="qvl-loop", daemon=True)
                self._thread.start()
                self._portal = ready.result(timeout=30)
            return self._portal

    def _after_fork(self) -> None:
        # The thread stayed in the parent; whoever called it would wait for ever.
        self._lock = threading.Lock()
        self._forked = self._forked or self._claimed
        self._portal = self._thread = None


class _Work(Generic[R]):
    """An awaitable running on the loop that can be cancelled even before it starts."""

    def __init__(self, function: Callable[[], Awaitable[R]]) -> None:
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._cancelled = False

    async def run(self) -> R:
        with anyio.CancelScope() as self._scope:
            if self._cancelled:
                self._scope.cancel()
            return await self._function()
        raise asyncio.CancelledError

    def cancel(self) -> None:
        """Cancel the work, started or not. Must be called on the loop."""
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()


def _serve_portal(ready: Future[BlockingPortal]) -> None:
    async def main() -> None:
        async with BlockingPortal() as portal:
            ready.set_result(portal)
            await portal.sleep_until_stopped()

    try:
        anyio.run(main)
    except BaseException as exc:  # noqa: BLE001 - the waiter must not hang when the loop cannot start
        if not ready.done():
            ready.set_exception(exc)


def _forget_threads() -> None:
    for loop in list(_loops):
        loop._after_fork()


_loops: weakref.WeakSet[_Loop] = weakref.WeakSet()
