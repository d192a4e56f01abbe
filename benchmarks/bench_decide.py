"""Forty questions about one picture and a long context, against one of them; the bundled model, no cache.

python benchmarks/bench_decide.py [--words 400]
"""

from __future__ import annotations

import argparse
import time

from qvl import Pipeline
from qvl.decisions import Choice, Decisions
from qvl.testing.asking import square

REPEATS = 3
QUESTIONS = [Choice(f"Is this number {n}?", ["red", "blue", "green", "none of these"]) for n in range(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=400, help="length of the context, in sentences of seven words")
    sentences = parser.parse_args().words
    with Pipeline(cache="off") as pipe:
        pipe.decide(square(), QUESTIONS[:2])
        for number in (1, len(QUESTIONS)):
            seconds, last = [], None
            for run in range(REPEATS):
                # Another beginning each time, so that no earlier prefix is found.
                context = f"{number} {run}. " + "The seller says many things about it. " * sentences
                began = time.perf_counter()
                last = pipe.decide(square((number, run, 9)), QUESTIONS[:number], context)
                seconds.append(time.perf_counter() - began)
            assert isinstance(last, Decisions)
            shared = last.usage.cached_tokens / last.usage.prompt_tokens
            print(
                f"{number:3} questions: {min(seconds):.2f} s, {shared:.1%} of {last.usage.prompt_tokens} tokens shared"
            )


if __name__ == "__main__":
    main()
