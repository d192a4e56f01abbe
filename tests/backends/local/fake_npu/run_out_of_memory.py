"""Small requests beside one whose rows this NPU cannot hold; started by test_npu.py in a process of its own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[4])]

from qvl.backends.local.backend import LocalBackend  # noqa: E402 - the paths come first
from tests.backends.local.requests import ask  # noqa: E402

SMALL = [ask(place, "What brand is it?", max_tokens=6) for place in range(3)]
LARGE = ask("hello " * 1900, max_tokens=4)


async def settle(device: str, *requests: Any) -> tuple[list[Any], str | None]:
    async with LocalBackend(device=device, dtype="float32", kv_cache_bytes=32 << 20) as backend:
        answers = [backend.generate(request) for request in requests]
        found = await asyncio.gather(*answers, return_exceptions=True)
        found += [await backend.generate(SMALL[0])]
        return found, backend.unready()


if __name__ == "__main__":
    there, _ = asyncio.run(settle("cpu", *SMALL))
    here, unready = asyncio.run(settle("auto", LARGE, *SMALL))
    print("large", type(here[0]).__name__)
    assert [result.text for result in here[1:]] == [result.text for result in there], here
    assert unready is None
    print("small equal")
