"""The local engine in each form that it has on a CPU, on one checkpoint of random weights: which is fastest at what?

For every form (dtype, kernel, int8) the engine is opened in a process of its own, and 1, 8 and 32 answers run at
once: tokens a second while all decode, milliseconds of a prompt of some 1,500 tokens, memory of the process, and what
`describe()` says of the kernels taken. Forms take turns, `--repeat` times; the best of each is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_engine_checkpoint import SHAPES, write

FORMS: dict[str, dict[str, Any]] = {
    "float32, plain": {"dtype": "float32", "decode_kernel": "plain"},
    "float32, oneDNN": {"dtype": "float32", "decode_kernel": "onednn"},
    "float32, FBGEMM": {"dtype": "float32", "decode_kernel": "fbgemm"},
    "float32, measured": {"dtype": "float32"},
    "bfloat16, plain": {"dtype": "bfloat16", "decode_kernel": "plain"},
    "bfloat16, oneDNN": {"dtype": "bfloat16", "decode_kernel": "onednn"},
    "bfloat16, FBGEMM": {"dtype": "bfloat16", "decode_kernel": "fbgemm"},
    "bfloat16, measured": {"dtype": "bfloat16"},
    "int8 (bfloat16)": {"dtype": "bfloat16", "quantize": "int8"},
    "int8 (float32)": {"dtype": "float32", "quantize": "int8"},
}
CLIENTS = (1, 8, 32)


async def measure(folder: str, settings: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the figures of one form."""
    from qvl.backends.local.backend import LocalBackend
    from qvl.types import ChatRequest, Message, SamplingParams, TextPart

    def request(text: str, count: int) -> ChatRequest:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return ChatRequest([Message("user", [TextPart(text)])], sampling=sampling)

    async def answer(backend: LocalBackend, text: str, count: int) -> list[float]:
        return [time.perf_counter() async for _ in backend.stream(request(text, count))]

    figures: dict[str, Any] = {}
    start = time.perf_counter()
    backend = LocalBackend(folder, device="cpu", kv_cache_bytes=1 << 30, prefix_cache=False, **settings)
    async with backend:
        figures["load_s"] = time.perf_counter() - start
        figures["kernels"] = backend.describe()
        await answer(backend, "warm", 4)
        start = time.perf_counter()
        await answer(backend, "word " * 500, 1)
        figures["prompt_ms"] = (time.perf_counter() - start) * 1e3
        for clients in CLIENTS:
            stamps = await asyncio.gather(*(answer(backend, f"question {index}", tokens) for index in range(clients)))
            begin, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
            count = sum(begin <= at <= end for times in stamps for at in times)
            figures[str(clients)] = count / (end - begin)
    figures["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    figures["resident_mib"] = int(lines["VmRSS"].split()[0]) / 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/kernels"))
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--layers", type=int, default=7, help="text layers, for less memory than the whole model's")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), metavar="NAME", help="; ".join(FORMS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = write(given.folder / f"{given.shape}-{given.layers}", given.shape, layers=given.layers)
    if given.form:
        print(json.dumps(asyncio.run(measure(str(folder), FORMS[given.form], given.tokens))))
        return
    best: dict[str, dict[str, Any]] = {}
    for _ in range(given.repeat):
        for form in given.forms:
            command = [sys.executable, *sys.argv, "--form", form]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            kept = best.setdefault(form, figures)
            for clients in map(str, CLIENTS):
                kept[clients] = max(kept[clients], figures[clients])
            kept["prompt_ms"] = min(kept["prompt_ms"], figures["prompt_ms"])
    print("| form | tokens/s at 1 | 8 | 32 | prompt, ms | MiB resident | kernels |")
    print("|---|---|---|---|---|---|---|")
    for form, kept in best.items():
        rates = " | ".join(f"{kept[str(clients)]:.1f}" for clients in CLIENTS)
        print(f"| {form} | {rates} | {kept['prompt_ms']:.0f} | {kept['resident_mib']:.0f} | {kept['kernels']} |")


if __name__ == "__main__":
    main()
