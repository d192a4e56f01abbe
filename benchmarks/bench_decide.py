"""Forty questions about the same pictures and context against one of them, in processor time of one thread; no cache.

python benchmarks/bench_decide.py [--shape 2b [--tokenizer DIR] [--layers 28]] [--repeat 1]

`2b` are random weights in the proportions of Qwen3-VL-2B with a seventh of its layers, 4 of 28 in text and 3 of 24 in
the tower, and pictures of 1,024 tokens: questions, pictures and context cost in the same proportions as in the whole
model, but for the output layer, which is whole and reads every question seven times as dearly. With the published
tokenizer a question has as many tokens as it will have; the bundled one cuts its words into more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import bench_engine_checkpoint
import numpy as np
from PIL import Image

from qvl import Pipeline
from qvl.decisions import Choice, Predicate, Score
from qvl.decisions.questions import QuestionLike, orders

# Pictures, and sentences of the context.
SETTINGS = ((1, 0), (3, 0), (1, 100), (3, 100), (1, 400), (3, 380))
SENTENCE = "The seller says many things about it. "
SIDE = 1024
CHOICES = [Choice(f"Is this number {n}?", ["red", "blue", "green", "none of these"]) for n in range(40)]
YES_NO = [Predicate(f"Is this number {n} of the list?") for n in range(40)]
SCORES = [Score(f"How worn is part {n}?", ["new", "used", "worn", "broken"]) for n in range(40)]
KINDS: dict[str, Sequence[QuestionLike]] = {
    "40 of four options": CHOICES,
    "40 of yes or no": YES_NO,
    "40 of all kinds": [*CHOICES[:12], *YES_NO[:20], *SCORES[:8]],
}


def checkpoint(folder: Path, layers: int, tokenizer: Path | None) -> str:
    """The folder of a checkpoint in the proportions of the 2B, with pictures of up to SIDE pixels a side."""
    shape = bench_engine_checkpoint.SHAPES["2b"]
    whole = shape["text"]["num_hidden_layers"]
    if layers < whole:
        depth = max(1, shape["vision"]["depth"] * layers // whole)
        shape["vision"] |= {"depth": depth, "deepstack_visual_indexes": [depth // 2]}
    bench_engine_checkpoint.write(folder, "2b", layers=layers, tokenizer=tokenizer)
    path = folder / "preprocessor_config.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules["size"] = {"shortest_edge": 65536, "longest_edge": SIDE * SIDE}
    path.write_text(json.dumps(rules), encoding="utf-8")
    return str(folder)


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE))


def measure(
    pipe: Pipeline, settings: Sequence[tuple[int, int]], kinds: Mapping[str, Sequence[QuestionLike]], repeat: int
) -> None:
    seed = 0
    for pictures, sentences in settings:
        one = 0.0
        for kind, questions in (("one question", CHOICES[:1]), *kinds.items()):
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
    parser.add_argument("--tokenizer", type=Path, help="a folder with a published Qwen3-VL's tokenizer, for 2b")
    parser.add_argument("--layers", type=int, default=4, help="layers of text of 2b: 28 is the whole model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which forty")
    parser.add_argument("--settings", type=int, nargs="+", default=range(len(SETTINGS)), help="by their numbers")
    parser.add_argument("--repeat", type=int, default=3, help="of so many runs the shortest")
    parser.add_argument("--folder", type=Path, help="where the checkpoint of 2b is kept, a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        model = checkpoint(folder, arguments.layers, arguments.tokenizer) if arguments.shape == "2b" else None
        with Pipeline(f"local:{model}" if model else None, cache="off") as pipe:
            pipe.decide(picture(0), CHOICES[:2])
            kinds = {kind: KINDS[kind] for kind in arguments.kinds}
            measure(pipe, [SETTINGS[number] for number in arguments.settings], kinds, arguments.repeat)


if __name__ == "__main__":
    main()
