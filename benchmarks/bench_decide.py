"""Forty questions about the same pictures and context against one of them, in processor time of one thread; no cache.

python benchmarks/bench_decide.py [--shape 2b] [--repeat 1]

`2b` are random weights in the proportions of Qwen3-VL-2B with a seventh of its layers, 4 of 28 in text and 3 of 24 in
the tower, and pictures of 1,024 tokens: questions, pictures and context cost in the same proportions as in the whole
model, but for the output layer, which is whole and reads every question seven times as dearly.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import bench_engine_checkpoint
import numpy as np
from PIL import Image

from qvl import Pipeline
from qvl.decisions import Choice, Predicate, Score
from qvl.decisions.questions import orders

# Pictures, and sentences of the context.
SETTINGS = ((1, 0), (3, 0), (1, 100), (3, 100), (1, 400), (3, 380))
SENTENCE = "The seller says many things about it. "
SIDE = 1024
CHOICES = [Choice(f"Is this number {n}?", ["red", "blue", "green", "none of these"]) for n in range(40)]
YES_NO = [Predicate(f"Is this number {n} of the list?") for n in range(40)]
SCORES = [Score(f"How worn is part {n}?", ["new", "used", "worn", "broken"]) for n in range(40)]
KINDS = {
    "40 of four options": CHOICES,
    "40 of yes or no": YES_NO,
    "40 of all kinds": [*CHOICES[:12], *YES_NO[:20], *SCORES[:8]],
}


def checkpoint(folder: Path) -> str:
    """The folder of a checkpoint in the proportions of the 2B, with pictures of up to SIDE pixels a side."""
    shape = bench_engine_checkpoint.SHAPES["2b"]
    shape["vision"] |= {"depth": 3, "deepstack_visual_indexes": [1]}
    bench_engine_checkpoint.write(folder, "2b", layers=4)
    path = folder / "preprocessor_config.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules["size"] = {"shortest_edge": 65536, "longest_edge": SIDE * SIDE}
    path.write_text(json.dumps(rules), encoding="utf-8")
    return str(folder)


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE))


def measure(pipe: Pipeline, settings: Sequence[tuple[int, int]], repeat: int) -> None:
    seed = 0
    for pictures, sentences in settings:
        one = 0.0
        for kind, questions in (("one question", CHOICES[:1]), *KINDS.items()):
            times = []
            for _ in range(repeat):
                # Other pictures and another beginning each time, so that nothing earlier is found.
                seed += 1
                shown = [picture(1000 * seed + number) for number in range(pictures)]
                began = time.process_time()
                found = pipe.decide(shown, questions, f"{seed}. " + SENTENCE * sentences)
                times.append(time.process_time() - began)
            one = one or min(times)
            tokens = max(answer.usage.prompt_tokens // len(orders(answer.question)) for answer in found)
            print(
                f"{pictures} pictures, {sentences:3} sentences, {kind:18} {min(times):6.2f} s,"
                f" {min(times) / one:5.2f} times one, prompts of {tokens:,} tokens",
                flush=True,
            )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("bundled", "2b"), default="bundled")
    parser.add_argument("--settings", type=int, nargs="+", default=range(len(SETTINGS)), help="by their numbers")
    parser.add_argument("--repeat", type=int, default=3, help="of so many runs the shortest")
    parser.add_argument("--folder", type=Path, help="where the checkpoint of 2b is kept, a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        model = checkpoint(arguments.folder or Path(made)) if arguments.shape == "2b" else None
        with Pipeline(f"local:{model}" if model else None, cache="off") as pipe:
            pipe.decide(picture(0), CHOICES[:2])
            measure(pipe, [SETTINGS[number] for number in arguments.settings], arguments.repeat)


if __name__ == "__main__":
    main()
