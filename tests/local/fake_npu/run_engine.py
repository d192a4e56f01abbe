"""Runs mixed requests on the fake NPU and on the CPU and compares; started by test_npu.py in a process of its own."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

from tests.local.requests import ask, mixed  # noqa: E402

from qvl.backends.local.backend import LocalBackend  # noqa: E402 - the paths come first
from qvl.types import ResponseFormat, Result  # noqa: E402


def answers(device: str, count: int) -> tuple[list[Result], str]:
    async def run() -> tuple[list[Result], str]:
        async with LocalBackend(device=device, dtype="float32", kv_cache_bytes=16 << 20) as backend:
            wanted = mixed(count, random.Random(5))
            wanted += [
                ask(1, "Describe the picture.", temperature=1.2, top_k=9, top_p=0.9, min_p=0.01, seed=3, n=2),
                ask(2, "x", repetition_penalty=1.3, presence_penalty=0.5, logprobs=3),
                ask(3, "x", max_tokens=30).replace(response_format=ResponseFormat("choice", choices=("mug", "bag"))),
            ]
            results = await asyncio.gather(*(backend.generate(request) for request in wanted))
            again = await asyncio.gather(*(backend.generate(request) for request in wanted[:4]))
            assert [r.text for r in again] == [r.text for r in results[:4]]
            return list(results), backend.describe()

    return asyncio.run(run())


if __name__ == "__main__":
    number = int(sys.argv[1])
    here, described = answers("auto", number)
    assert described.startswith("npu:0 (Ascend910B3), float32"), described
    there, _ = answers("cpu", number)
    assert [[c.text for c in r.choices] for r in here] == [[c.text for c in r.choices] for r in there]
    assert [r.usage.completion_tokens for r in here] == [r.usage.completion_tokens for r in there]
    print("equal", len(here))
