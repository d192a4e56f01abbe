"""Host time of a decode step: all that is neither the forward pass nor the output layer. On a GPU it runs in series.

Two thin layers and Qwen's whole vocabulary, random weights, one thread. Processor milliseconds of the shortest step in
which all clients decode: `greedy`, Qwen's own sampling (temperature 0.7, top_p 0.8, top_k 20), a temperature alone
(which random weights make the worst case: so flat that the likeliest tokens never decide), penalties over a prompt of
1,000 tokens, a JSON schema.

    python benchmarks/bench_step_host.py [--clients 1 8 32] [--tokens 24]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from bench_engine_checkpoint import SHAPES, write

from qvl.backends.local.backend import LocalBackend
from qvl.types import ChatRequest, Message, ResponseFormat, SamplingParams, TextPart

SHAPES["thin"] = SHAPES["2b"] | {
    "text": SHAPES["2b"]["text"] | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 2, "out_hidden_size": 128,
               "deepstack_visual_indexes": [1], "num_position_embeddings": 2304},
}  # fmt: skip
SCHEMA: Final = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
FORMS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "temperature": {"temperature": 1.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "schema": {"temperature": 0.0},
}


class Clock:
    """Seconds spent within the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed


def watch(backend: LocalBackend, clients: int, steps: list[float]) -> None:
    """Have `steps` filled with the host's seconds of each step in which all clients decode."""
    engine = backend._loaded.engine  # type: ignore[union-attr]
    decoder, clock = engine.runner.decoder, Clock()
    decoder.forward, decoder.logits = clock.wrap(decoder.forward), clock.wrap(decoder.logits)
    plain = engine.step

    def step() -> None:
        running = engine.scheduler.running
        steady = len(running) == clients and all(sequence.num_output for sequence in running)
        clock.seconds, began = 0.0, time.thread_time()
        plain()
        if steady:
            steps.append(time.thread_time() - began - clock.seconds)

    engine.step = step


async def measure(folder: Path, clients: int, name: str, tokens: int) -> float:
    words = "".join(random.Random(0).choices(string.ascii_letters, k=1600 if name == "penalties" else 60))
    form = ResponseFormat("json_schema", schema=SCHEMA) if name == "schema" else ResponseFormat()
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, **FORMS[name])
    steps: list[float] = []
    async with LocalBackend(
        str(folder), device="cpu", dtype="bfloat16", max_model_len=2048, max_num_seqs=32
    ) as backend:
        watch(backend, clients, steps)
        requests = [
            ChatRequest((Message("user", (TextPart(f"{number} {words}"),)),), sampling, form)
            for number in range(clients)
        ]
        await asyncio.gather(*(backend.generate(request) for request in requests))
    return min(steps) * 1e3 if steps else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = write(Path("build") / "bench-thin", "thin")
    print("| clients | " + " | ".join(FORMS) + " |\n|" + "---|" * (len(FORMS) + 1))
    for clients in given.clients:
        times = [asyncio.run(measure(folder, clients, name, given.tokens)) for name in FORMS]
        print(f"| {clients} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
