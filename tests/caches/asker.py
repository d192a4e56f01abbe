"""One process that asks one question: `python asker.py CACHE LOG LEASE_SECONDS ANSWER_SECONDS WHAT`.

It writes a line to LOG when its backend begins to work and to LOG.renew and LOG.wait when it renews a lease or waits
for one, and prints where its answer came from, or its error. WHAT is `answer`, `fail` (the backend does) or `leave`
(without waiting for the answer).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

from qvl import AsyncPipeline
from qvl.errors import BackendUnavailableError, QvlError
from qvl.testing import EchoBackend
from qvl.types import ChatRequest, Chunk


class Working(EchoBackend):
    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        note(log)
        await asyncio.sleep(float(answer_seconds))
        if what == "fail":
            raise BackendUnavailableError("out of order")
        async for chunk in super().stream(request):
            yield chunk


def note(path: str) -> None:
    with open(path, "a") as out:
        out.write(f"{os.getpid()}\n")


def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with a line in LOG.name each time."""

    def noted(*arguments: Any) -> Any:
        note(f"{log}.{name}")
        return call(*arguments)

    return noted


async def main() -> None:
    async with AsyncPipeline(backend=Working(), cache=cache) as pipe:
        assert pipe.executor.store is not None
        pipe.executor.store.lease_seconds = float(lease_seconds)
        for name in ("renew", "wait"):
            setattr(pipe.executor.store.cache, name, noting(name, getattr(pipe.executor.store.cache, name)))
        asked = asyncio.ensure_future(pipe.ask([], "who works?"))
        if what == "leave":
            await asyncio.wait((asked,), timeout=float(lease_seconds))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            print("left" if asked.cancelled() else "answered too soon", flush=True)
            return
        try:
            print((await asked).cache, flush=True)
        except QvlError as exc:
            print(exc, flush=True)


if __name__ == "__main__":
    cache, log, lease_seconds, answer_seconds, what = sys.argv[1:]
    asyncio.run(main())
