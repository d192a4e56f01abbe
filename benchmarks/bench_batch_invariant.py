"""Cost of the batch-invariant mode: python benchmarks/bench_batch_invariant.py [MODEL] [DTYPE]

Prints tokens/s of 1 and of 16 concurrent answers, and prompt tokens/s of one long prompt, without and with the mode.
"""

from __future__ import annotations

import asyncio
import sys
import time

from qvl.backends.local.backend import LocalBackend
from qvl.types import ChatRequest, Message, SamplingParams, TextPart


def ask(words: str, tokens: int) -> ChatRequest:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return ChatRequest((Message("user", (TextPart(words),)),), sampling)


async def measure(model: str | None, dtype: str, invariant: bool) -> tuple[float, float, float]:
    async with LocalBackend(
        model, dtype=dtype, kv_cache_bytes=256 << 20, prefix_cache=False, batch_invariant=invariant
    ) as backend:
        await backend.generate(ask("warm", 8))
        rates = []
        for count in (1, 16):
            began = time.perf_counter()
            await asyncio.gather(*(backend.generate(ask(f"What is {place}?", 64)) for place in range(count)))
            rates.append(count * 64 / (time.perf_counter() - began))
        began = time.perf_counter()
        long = await backend.generate(ask("word " * 600, 1))
        return rates[0], rates[1], long.usage.prompt_tokens / (time.perf_counter() - began)


def main(model: str | None = None, dtype: str = "bfloat16") -> None:
    print("| mode | 1 answer | 16 answers | prompt |\n|---|---|---|---|")
    for invariant in (False, True):
        one, many, prompt = asyncio.run(measure(model, dtype, invariant))
        print(f"| {'batch-invariant' if invariant else 'as usual'} | {one:.0f} | {many:.0f} | {prompt:.0f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
