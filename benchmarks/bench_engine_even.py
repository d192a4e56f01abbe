"""How even streams are while others start: 32 clients on the engine in this process, for each goal.

Each of N clients asks about 448 x 448 pictures, each its own, for 64 greedy tokens, and sends its next request when its
last answer is complete. With `--processor-time` the clock of everything, the engine's budget included, is the processor
time of this process: on a busy machine, with OMP_NUM_THREADS=1, that is what an idle one would take.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np
from bench_engine import quantile
from bench_engine_checkpoint import write
from PIL import Image

from qvl.backends.local.backend import LocalBackend
from qvl.media.gate import load
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart


def request(seed: int, tokens: int) -> ChatRequest:
    noise = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    picture = load(Image.fromarray(noise).resize((448, 448)))
    message = Message("user", (ImagePart(picture), TextPart("Describe this picture in detail.")))
    return ChatRequest((message,), SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0))


async def row(goal: str, given: argparse.Namespace, folder: Path) -> str:
    """One row of the table; `goal` is empty for a version of the engine that knows none."""
    settings: dict[str, object] = {"goal": goal} if goal else {}
    backend = LocalBackend(str(folder), device="cpu", dtype=given.dtype, **settings)  # type: ignore[arg-type]
    first: list[float] = []
    gaps: list[float] = []
    await backend.open()
    await asyncio.gather(*(backend.generate(request(10**6 + place, 12)) for place in range(4)))

    async def client(number: int) -> None:
        for turn in range(given.rounds):
            asked = request(1000 * turn + number, 64)
            last = began = time.perf_counter()
            async for chunk in backend.stream(asked):
                if chunk.text:
                    now = time.perf_counter()
                    (gaps if last != began else first).append(now - last)
                    last = now

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(given.clients)))
    seconds = time.perf_counter() - began
    decode = backend.stats().get("cost_decode_step_seconds", float("nan"))
    await backend.aclose()
    p50, p95, p99 = (quantile(gaps, share) * 1e3 for share in (0.5, 0.95, 0.99))
    tokens = len(first) + len(gaps)
    return (
        f"| {goal or 'none'} | {tokens / seconds:.1f} | {quantile(first, 0.5):.1f} / {quantile(first, 0.95):.1f} s | "
        f"{p50:.0f} / {p95:.0f} / {p99:.0f} ms | {decode * 1e3:.0f} ms |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", nargs="*", default=["throughput", "latency"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="requests of each client")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processor-time", action="store_true")
    given = parser.parse_args()
    if given.processor_time:
        time.perf_counter = time.process_time
    folder = write(Path("build") / "bench-130m").resolve()
    print("| goal | tokens/s | first token p50 / p95 | between tokens p50 / p95 / p99 | decode step |")
    print("|---|---|---|---|---|", flush=True)
    for goal in given.goals:
        print(asyncio.run(row(goal, given, folder)), flush=True)


if __name__ == "__main__":
    main()
