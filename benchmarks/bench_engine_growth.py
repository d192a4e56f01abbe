"""Scaling of the engine: tokens/s and memory against running sequences, and against context length.

`python benchmarks/bench_engine_growth.py` measures the engine in this process on the random weights of bench_engine.py,
and writes engine-growth.json and engine-growth.png beside this file. Only moments at which all sequences of a point run
count: the time of a decode step is the median time between the tokens of an answer then. On a machine that others use,
`--processor-time` takes what one thread spent on a step instead, which is what a free core would need.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bench_engine import machine
from bench_engine_checkpoint import SHAPES, write

from qvl.backends.local.backend import LocalBackend
from qvl.types import ChatRequest, Message, SamplingParams, TextPart

HERE = Path(__file__).parent


async def point(
    backend: LocalBackend, sequences: int, context: int, tokens: int, processor_time: bool
) -> dict[str, float]:
    """One point: `sequences` answers of `tokens` tokens at once, their prompts `context` tokens long, or nearly."""
    prompt = (TextPart(" the" * max(1, context - tokens // 2 - 16)),)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    prompts: list[int] = []

    # Processor time passes for the whole process: divided by the steps of the stretch, not taken from gap to gap.
    clock = time.process_time if processor_time else time.perf_counter

    async def one() -> list[float]:
        times = []
        async for chunk in backend.stream(ChatRequest((Message("user", prompt),), sampling)):
            times.append(clock())
            if chunk.usage is not None:
                prompts.append(chunk.usage.prompt_tokens)
        return times

    # Its prefix is known afterwards, so that the answers begin together.
    await one()
    answers = await asyncio.gather(*(one() for _ in range(sequences)))
    first, last = max(times[0] for times in answers), min(times[-1] for times in answers)
    gaps = [gap for times in answers for gap in _gaps(times, first, last)]
    step = statistics.median(gaps)
    if processor_time:
        step = max(statistics.mean(stretch) for times in answers if (stretch := _gaps(times, first, last)))
    stats = backend.stats()
    return {
        "sequences": sequences,
        "context": prompts[-1] + tokens // 2,
        "step_ms": step * 1e3,
        "tokens_per_s": sequences / step,
        "kv_mib": stats["kv_bytes"] / 2**20,
    }


def _gaps(times: list[float], first: float, last: float) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times) if a >= first and b <= last]


async def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    async def fresh(sequences: int, context: int) -> dict[str, float]:
        # A backend of its own for each point: memory that an earlier point took would count for the next.
        options = {"device": arguments.device, "dtype": arguments.dtype, "max_num_seqs": max(arguments.sequences)}
        async with LocalBackend(str(folder), **options) as backend:
            report.setdefault("device", backend.describe())
            made = await point(backend, sequences, context, arguments.tokens, arguments.processor_time)
            print(json.dumps({key: round(value, 2) for key, value in made.items()}), flush=True)
            return made

    report: dict[str, Any] = {
        "machine": machine(),
        "shape": arguments.shape,
        "processor_time": arguments.processor_time,
    }
    if arguments.processor_time:
        import torch

        torch.set_num_threads(1)
    report["by_sequences"] = [await fresh(count, 256) for count in arguments.sequences]
    report["by_context"] = [await fresh(arguments.at, context) for context in arguments.contexts]
    report["at"] = arguments.at
    return report


def plot(report: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    sides = (("by_sequences", "sequences", "running sequences, 256 tokens of context each"),
             ("by_context", "context", f"tokens of context, {report['at']} sequences"))  # fmt: skip
    of_core = " of processor time" if report["processor_time"] else ""
    for panel, (name, key, label) in zip(panels, sides, strict=True):
        rows = report[name]
        positions = [row[key] for row in rows]
        panel.plot(positions, [row["tokens_per_s"] for row in rows], "o-", color="tab:blue")
        panel.set(xlabel=label, xscale="log", ylim=(0, None))
        panel.set_xticks(positions, [f"{position:.0f}" for position in positions])
        panel.minorticks_off()
        panel.set_ylabel(f"output tokens/s{of_core}", color="tab:blue")
        memory = panel.twinx()
        memory.plot(positions, [row["kv_mib"] for row in rows], "s--", color="tab:orange")
        memory.set_ylim(0, None)
        memory.set_ylabel("KV memory, MiB", color="tab:orange")
    figure.suptitle(f"{report['shape']}, {report['device']}", fontsize=9)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8000])
    parser.add_argument("--at", type=int, default=4, help="sequences at which the length of context is varied")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of the clock's")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for engine-growth.json and .png")
    parser.add_argument("--plot-only", action="store_true", help="draw the JSON that is there")
    arguments = parser.parse_args()
    kept = arguments.out / "engine-growth.json"
    if arguments.plot_only:
        report = json.loads(kept.read_text(encoding="utf-8"))
    else:
        report = asyncio.run(measure(write(Path("build") / f"bench-{arguments.shape}", arguments.shape), arguments))
        kept.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, arguments.out / "engine-growth.png")


if __name__ == "__main__":
    main()
