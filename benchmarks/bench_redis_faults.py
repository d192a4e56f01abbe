"""Latency of requests while their Redis cache fails: killed, paused, restarted empty, full.

    python benchmarks/bench_redis_faults.py [--clients 16] [--seconds 3]

A pipeline with a model that answers at once, a Redis cache as shipped, and clients that ask without pause: three of
four questions are new, one was asked before. No request may fail. Latencies are of the requests that end in each phase.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl import AsyncPipeline
from qvl.backends.base import Backend, Capabilities
from qvl.caches.redis import open_redis
from qvl.types import ChatRequest, Chunk, Usage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.caches.redis_server import RedisServer  # noqa: E402


class Canned(Backend):
    """Answers every request at once with the same words."""

    name, model = "canned", "canned"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(text="A red mug by NORVIK. " * 100)
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=20, completion_tokens=500))


@dataclass
class Phase:
    """The requests that ended while something was the case."""

    name: str
    took: list[float] = field(default_factory=list)
    hits: int = 0
    failed: int = 0
    seconds: float = 0.0

    def row(self, scenario: str) -> str:
        ranks = sorted(self.took) or [0.0]
        p50, p99 = 1000 * statistics.median(ranks), 1000 * ranks[int(len(ranks) * 0.99)]
        rate = len(self.took) / self.seconds
        share = 100 * self.hits / max(1, len(self.took))
        return (
            f"| {scenario} | {self.name} | {self.failed} of {len(self.took)} | {rate:.0f} | {share:.0f} % "
            f"| {p50:.1f} | {p99:.1f} | {1000 * ranks[-1]:.0f} |"
        )


class Load:
    """Clients that ask without pause; `phase` is where their requests are noted."""

    def __init__(self, pipeline: AsyncPipeline, clients: int) -> None:
        self.pipeline, self.clients = pipeline, clients
        self.phase = Phase("")
        self.stopped = False
        self.numbers = itertools.count()
        self.recent: deque[str] = deque(maxlen=256)

    async def client(self) -> None:
        while not self.stopped:
            number = next(self.numbers)
            again = number % 4 == 0 and len(self.recent) == self.recent.maxlen
            question = self.recent[0] if again else f"What is number {number}?"
            began = time.perf_counter()
            try:
                result = await self.pipeline.ask([], question)
                self.phase.hits += result.cache == "hit"
            except Exception as exc:
                print(f"failed: {exc}", file=sys.stderr)
                self.phase.failed += 1
            if not again:
                self.recent.append(question)
            self.phase.took.append(time.perf_counter() - began)
            await asyncio.sleep(0)

    async def during(self, name: str, work: Awaitable[Any]) -> Phase:
        self.phase = phase = Phase(name)
        began = time.perf_counter()
        await work
        phase.seconds = time.perf_counter() - began
        return phase


async def until(promise: Callable[[], bool], limit: float = 40.0) -> None:
    deadline = time.monotonic() + limit
    while not promise():
        if time.monotonic() > deadline:
            raise SystemExit("the cache never came back")
        await asyncio.sleep(0.01)


async def scenario(name: str, server: RedisServer, seconds: float, clients: int) -> None:
    """One server, one pipeline, and what happens to them."""
    cache = open_redis(f"{server.url}?front_ttl=0.001")
    back = cache.back  # type: ignore[attr-defined]
    pipeline = AsyncPipeline(backend=Canned(), cache=cache)
    load = Load(pipeline, clients)
    await pipeline.open()
    tasks = [asyncio.create_task(load.client()) for _ in range(clients)]
    phases = []

    def writes() -> Callable[[], bool]:
        before = back.stats().writes
        return lambda: back._tally._counts["writes"] > before

    async def note(phase: str, work: Awaitable[Any]) -> None:
        phases.append(await load.during(phase, work))

    await load.during("warming up", asyncio.sleep(1))
    await note("all well", asyncio.sleep(seconds))
    if name == "killed -9, restarted empty":
        server.kill()
        await note("no server", asyncio.sleep(seconds))
        await asyncio.to_thread(server.start)
        await note("back, empty, until first used", until(writes()))
    elif name == "paused for 5 s":
        server.pause()
        await note("paused", asyncio.sleep(5))
        server.resume()
        await note("resumed, until first used", until(writes()))
    elif name == "maxmemory reached":
        await asyncio.to_thread(server.command, b"CONFIG SET maxmemory 1mb")
        await note("full, refuses writes", asyncio.sleep(seconds))
        await asyncio.to_thread(server.command, b"CONFIG SET maxmemory 1gb")
        await note("room again, until first used", until(writes()))
    elif name == "restarted at once, empty":
        server.kill()
        await note("restarting, until first used", asyncio.gather(asyncio.to_thread(server.start), until(writes())))
    await note("all well again", asyncio.sleep(seconds))
    load.stopped = True
    await asyncio.gather(*tasks)
    await pipeline.aclose()
    for phase in phases:
        took = f"{phase.name} ({phase.seconds:.1f} s)" if "until" in phase.name else phase.name
        phase.name = took
        print(phase.row(name), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| what happens | meanwhile | failed | requests/s | hits | p50 ms | p99 ms | slowest ms |")
    print("|---|---|---|---|---|---|---|---|")
    names = ("killed -9, restarted empty", "restarted at once, empty", "paused for 5 s", "maxmemory reached")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            server = RedisServer(Path(folder), "--maxmemory-policy", "noeviction")
            try:
                asyncio.run(scenario(name, server, arguments.seconds, arguments.clients))
            finally:
                server.close()


if __name__ == "__main__":
    main()
