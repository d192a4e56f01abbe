"""An endpoint in a process of its own, with scripted delays, that notes on its own clock what it did.

Run as `python -m tests.bench.timed_endpoint FIRST GAP TOKENS`; prints its URL, and its notes when stdin is closed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.scripted_endpoint import ScriptedEndpoint, ScriptedExchange

USAGE = {"prompt_tokens": 100, "prompt_tokens_details": {"image_tokens": 64}}


@dataclass(frozen=True)
class Timed:
    """`tokens` pieces, the first after `first` seconds, then one every `gap`; notes when each was sent."""

    first: float
    gap: float
    tokens: int
    notes: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, exchange: ScriptedExchange) -> None:
        received = time.perf_counter()
        due = received + self.first
        sent = []
        for place in range(self.tokens):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if place == 0:
                await exchange.head()
            sent.append(time.perf_counter())
            await exchange.event({"choices": [{"index": 0, "delta": {"content": f"t{place} "}}]})
            due += self.gap
        await exchange.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await exchange.event({"choices": [], "usage": {**USAGE, "completion_tokens": self.tokens}})
        await exchange.event(b"[DONE]")
        note = {"received": received, "sent": sent, "done": time.perf_counter(), "running": exchange.endpoint.running}
        self.notes.append({**note, "id": exchange.received.headers.get("x-request-id")})


@dataclass
class Remote:
    """The other process as a test sees it; `notes` are there when it has ended."""

    url: str
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def timed_endpoint(first: float, gap: float, tokens: int) -> Iterator[Remote]:
    command = [sys.executable, "-m", "tests.bench.timed_endpoint", str(first), str(gap), str(tokens)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        remote = Remote(process.stdout.readline().strip())
        try:
            yield remote
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            remote.notes.update({note["id"]: note for note in json.loads(process.stdout.read() or "[]")})


def main() -> None:
    first, gap, tokens = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    timed = Timed(first, gap, tokens)
    with ScriptedEndpoint(default=timed) as endpoint:
        print(endpoint.url, flush=True)
        sys.stdin.read()
    print(json.dumps(timed.notes))


if __name__ == "__main__":
    main()
