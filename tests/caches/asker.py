"""One process that asks one question: `python asker.py CACHE LOG LEASE_SECONDS ANSWER_SECONDS WHAT`.

It writes a line to LOG when its backend begins to work, and prints where its answer came from, or its error. WHAT is
`answer`, `fail` (the backend does) or `leave` (without waiting for the answer).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator

from qvl import AsyncPipeline
from qvl.errors import BackendUnavailableError, QvlError
from qvl.testing import EchoBackend
from qvl.types import ChatRequest, Chunk


class Working(EchoBackend):
    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        with open(log, "a") as out:
            out.write(f"{os.getpid()}\n")
        await asyncio.sleep(float(answer_seconds))
        if what == "fail":
            raise BackendUnavailableError("out of order")
        async for chunk in super().stream(request):
            yield chunk


async def main() -> None:
    async with AsyncPipeline(backend=Working(), cache=cache) as pipe:
        assert pipe.store is not None
        pipe.store.lease_seconds = float(lease_seconds)
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
