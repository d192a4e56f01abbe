"""Side by side on one checkpoint: qvl's engine in this process, plain generate, and any OpenAI-compatible servers.

`python benchmarks/bench_engine.py` builds the 130 M checkpoint under build/, measures the engine and one-at-a-time
`generate()`, and prints one table; `--server name=http://host:port/v1` adds a server that was started on the same
checkpoint (benchmarks/README.md says how to start each). Pictures are 448 x 448, answers 64 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench_engine_checkpoint import SHAPES, write
from PIL import Image

from qvl.backends.local.backend import LocalBackend
from qvl.media import load
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart

QUESTIONS = ("Describe this picture in detail.", "Another question about the very same picture: which brand?")


@dataclass
class Run:
    """Arrival times of the chunks of each request, in seconds since it was sent."""

    seconds: float = 0.0
    tokens: int = 0
    arrivals: list[list[float]] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        first = [times[0] for times in self.arrivals if times]
        gaps = [b - a for times in self.arrivals for a, b in itertools.pairwise(times)]
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_p50": quantile(first, 0.5),
            "ttft_p95": quantile(first, 0.95),
            "itl_p50": quantile(gaps, 0.5),
            "itl_p95": quantile(gaps, 0.95),
        }


def quantile(values: list[float], share: float) -> float:
    if not values:
        return float("nan")
    return (
        sorted(values)[min(len(values) - 1, int(share * len(values)))] if len(values) > 2 else statistics.mean(values)
    )


def image(seed: int, edge: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8))


Ask = Callable[[int, str, int], Awaitable[tuple[int, list[float]]]]


def engine_ask(backend: LocalBackend, edge: int) -> Ask:
    async def ask(seed: int, question: str, tokens: int) -> tuple[int, list[float]]:
        message = Message("user", (ImagePart(load(image(seed, edge))), TextPart(question)))
        request = ChatRequest((message,), SamplingParams(max_tokens=tokens, ignore_eos=True))
        started, times, used = time.perf_counter(), [], 0
        async for chunk in backend.stream(request):
            times.append(time.perf_counter() - started)
            used = chunk.usage.completion_tokens if chunk.usage else used
        return used, times

    return ask


def server_ask(client: httpx.AsyncClient, url: str, model: str, edge: int) -> Ask:
    async def ask(seed: int, question: str, tokens: int) -> tuple[int, list[float]]:
        data = io.BytesIO()
        image(seed, edge).save(data, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        for extra in ("ignore_eos", "stream_options", None):
            started, times, used, pieces = time.perf_counter(), [], 0, 0
            async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
                if response.status_code in (400, 422) and extra in body:
                    body.pop(extra)
                    continue
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    used = (event.get("usage") or {}).get("completion_tokens", used)
                    if any((choice.get("delta") or {}).get("content") for choice in event.get("choices", [])):
                        pieces += 1
                        times.append(time.perf_counter() - started)
            return used or pieces, times
        raise RuntimeError(f"{url} refuses the request")

    return ask


async def measure(ask: Ask, clients: int, tokens: int, first_seed: int) -> Run:
    """`clients` requests with pictures of their own, all at once."""
    started = time.perf_counter()
    done = await asyncio.gather(*(ask(first_seed + place, QUESTIONS[0], tokens) for place in range(clients)))
    return Run(time.perf_counter() - started, sum(used for used, _ in done), [times for _, times in done])


async def table(name: str, ask: Ask, clients: list[int], tokens: int) -> list[dict[str, Any]]:
    await ask(1, "Warm up.", 4)
    rows = []
    for place, count in enumerate(clients):
        run = await measure(ask, count, tokens, 1000 * (place + 1))
        rows.append({"engine": name, "clients": count, **run.row()})
    cold = [(await ask(9000 + place, QUESTIONS[0], 2))[1][0] for place in range(3)]
    warm = [(await ask(9000 + place, QUESTIONS[1], 2))[1][0] for place in range(3)]
    rows.append({"engine": name, "clients": 1, "same_picture": statistics.median(warm) / statistics.median(cold)})
    return rows


def generate_ask(folder: Path, dtype: str, edge: int) -> Ask:
    """`model.generate` behind a lock, as the plain servers over transformers do it."""
    import torch

    from qvl.backends.local.device import open_device
    from qvl.backends.local.loader import load as load_checkpoint
    from qvl.backends.local.processor import ImageRules, Processor

    device = open_device("auto", dtype)
    checkpoint = load_checkpoint(str(folder), device)
    rules = ImageRules.read(checkpoint.image_config)
    processor = Processor(checkpoint.tokenizer, rules, checkpoint.model.config.image_token_id)
    lock = asyncio.Lock()

    def answer(seed: int, question: str, tokens: int) -> int:
        message = Message("user", (ImagePart(load(image(seed, edge))), TextPart(question)))
        prepared = processor.prepare(ChatRequest((message,)))
        ids = torch.tensor([prepared.tokens], device=device.torch)
        rows, columns = prepared.pictures[0].grid
        size, merge = rules.patch_size, rules.merge_size
        pixels = torch.from_numpy(prepared.pictures[0].pixels).to(device.torch).permute(2, 0, 1).float() / 127.5 - 1
        cut = pixels.view(3, rows // merge, merge, size, columns // merge, merge, size).permute(1, 4, 2, 5, 0, 3, 6)
        patches = cut.unsqueeze(5).expand(*cut.shape[:5], 2, size, size).reshape(rows * columns, -1)
        more = {"mm_token_type_ids": (ids == checkpoint.model.config.image_token_id).int()}
        with torch.inference_mode():
            out = checkpoint.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=patches.to(device.dtype),
                image_grid_thw=torch.tensor([[1, rows, columns]], device=device.torch),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                **more,
            )
        return int(out.shape[1] - ids.shape[1])

    async def ask(seed: int, question: str, tokens: int) -> tuple[int, list[float]]:
        started = time.perf_counter()
        async with lock:
            used = await asyncio.to_thread(answer, seed, question, tokens)
        return used, [time.perf_counter() - started]

    return ask


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'engine':<18}{'clients':>8}{'tok/s':>9}{'ttft p50':>10}{'p95':>8}{'itl p50':>9}{'p95':>8}")
    for row in rows:
        if "same_picture" in row:
            print(
                f"{row['engine']:<18}{'':>8} same picture, new question: first token {row['same_picture']:.2f} x cold"
            )
            continue
        print(
            f"{row['engine']:<18}{row['clients']:>8}{row['tokens_per_s']:>9.1f}{row['ttft_p50']:>10.2f}"
            f"{row['ttft_p95']:>8.2f}{row['itl_p50']:>9.3f}{row['itl_p95']:>8.3f}"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--edge", type=int, default=448)
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--skip-generate", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    stored = "float32" if given.shape == "130m" else "bfloat16"
    folder = write(given.folder or Path("build") / f"bench-{given.shape}", given.shape, stored)
    rows: list[dict[str, Any]] = []
    async with LocalBackend(str(folder), dtype=given.dtype) as backend:
        print(backend.describe())
        rows += await table("qvl", engine_ask(backend, given.edge), given.clients, given.tokens)
    if not given.skip_generate:
        plain = generate_ask(folder, given.dtype, given.edge)
        rows += await table("generate", plain, [count for count in given.clients if count <= 8], given.tokens)
    async with httpx.AsyncClient(timeout=None) as client:
        for server in given.server:
            name, _, url = server.partition("=")
            model = (await client.get(f"{url}/models")).json()["data"][0]["id"]
            rows += await table(name, server_ask(client, url, model, given.edge), given.clients, given.tokens)
    show(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
