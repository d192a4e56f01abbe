"""Replicas under Ray Serve: one, two, and the same backend in this process, on the same load.

Every engine has one thread, so on a machine with two cores two replicas have twice as much to compute with as one. The
clients' side (this process, and Ray's own processes) works on the same cores, so the factor cannot be a whole 2 there.
Each of `--clients` asks one question after the other, each about a picture of its own, `--requests` in all; the median
of `--rounds` counts, the rows taken in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from bench_engine_checkpoint import write
from PIL import Image

from qvl import media
from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.backends.ray.backend import RayBackend
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart


def question(seed: int, edge: int, tokens: int) -> ChatRequest:
    """One question about a picture of noise; the answer is as long as it may be."""
    pixels = np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
    parts = (ImagePart(media.load(Image.fromarray(pixels))), TextPart("Describe this picture in detail."))
    return ChatRequest((Message("user", parts),), SamplingParams(max_tokens=tokens, ignore_eos=True))


async def load(backend: Backend, requests: list[ChatRequest], clients: int) -> tuple[float, int]:
    """Seconds for all requests, and the tokens that came."""
    waiting = list(reversed(requests))
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        while waiting:
            result = await backend.generate(waiting.pop())
            tokens += result.usage.completion_tokens

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, tokens


async def measure(make: Callable[[], Backend], args: argparse.Namespace, round_: int) -> tuple[float, float]:
    """Requests and tokens a second."""
    backend = make()
    await backend.open()
    try:
        warm = [question(10_000 + n, args.edge, args.tokens) for n in range(2 * args.clients)]
        await load(backend, warm[: args.clients], args.clients)
        seeds = range(round_ * args.requests, (round_ + 1) * args.requests)
        seconds, tokens = await load(backend, [question(s, args.edge, args.tokens) for s in seeds], args.clients)
    finally:
        await backend.aclose()
    return args.requests / seconds, tokens / seconds


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; by default one of 139 M random weights is made in build/")
    parser.add_argument("--devices", default="cpu", help="npu, cuda or cpu")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--edge", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = args.model or str(write(Path("build/bench-130m"), "130m"))
    options = {"kv_cache_bytes": 256 << 20} if args.devices == "cpu" else {}

    def under_ray(replicas: int) -> Callable[[], Backend]:
        more = {"cpus_per_replica": 1.0} if args.devices == "cpu" else {}
        return lambda: RayBackend(model, replicas=replicas, devices=args.devices, **more, **options)

    rows: dict[str, Callable[[], Backend]] = {
        "this process": lambda: LocalBackend(model, device=args.devices, **options),
        **{f"{n} replica{'s' * (n > 1)}": under_ray(n) for n in args.replicas},
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for round_ in range(args.rounds):
        for name, make in rows.items():
            measured[name].append(await measure(make, args, round_))
            print(f"round {round_ + 1}, {name}: {measured[name][-1][0]:.2f} requests/s", flush=True)
    import ray

    one = f"{args.replicas[0]} replica{'s' * (args.replicas[0] > 1)}"
    base = median(rate for rate, _ in measured[one])
    print(f"\n| engine | requests/s | tokens/s | against {one} |\n|---|---|---|---|")
    for name, results in measured.items():
        rates = [rate for rate, _ in results]
        tokens = median(rate for _, rate in results)
        spread = f"{min(rates):.2f} to {max(rates):.2f}"
        print(f"| {name} | {median(rates):.2f} ({spread}) | {tokens:.0f} | {median(rates) / base:.2f} |")
    print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Ray {ray.__version__}, {args.clients} clients, {args.requests} requests of {args.tokens} tokens a round"
    )


if __name__ == "__main__":
    asyncio.run(main())
