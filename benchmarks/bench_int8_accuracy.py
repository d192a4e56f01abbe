"""What 8 bits cost: right answers of the bundled model on held-out pictures, and greedy agreement on random weights.

    python benchmarks/bench_int8_accuracy.py [--n 300] [--agreement FOLDER]

Every form answers the same questions through the engine; an answer counts if it is the only right one, letter by
letter. Agreement is measured on random weights, whose answers say nothing but depend on every digit: of the tokens that
a form writes, the share up to the first that differs from float32's.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from training.evaluate import Case, cases

from qvl.backends.local.backend import LocalBackend
from qvl.media.gate import load
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 (float32)": {"dtype": "float32", "quantize": "int8"},
    "int8 (bfloat16)": {"dtype": "bfloat16", "quantize": "int8"},
}


def request(case: Case) -> ChatRequest:
    """Return the case as a request of qvl."""
    images = iter(case.request.images)
    messages = []
    for message in case.request.messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        made = [TextPart(part["text"]) if "text" in part else ImagePart(load(next(images))) for part in parts]
        messages.append(Message(message["role"], tuple(made)))
    return ChatRequest(tuple(messages), SamplingParams(max_tokens=64))


async def answers(folder: str | None, settings: dict[str, Any], requests: list[ChatRequest]) -> list[str]:
    """Return the texts of all requests, computed together."""
    async with LocalBackend(folder, device="cpu", kv_cache_bytes=1 << 30, max_queue=10_000, **settings) as backend:
        results = await asyncio.gather(*(backend.generate(one) for one in requests))
    return [result.text for result in results]


def questions(count: int, tokens: int) -> list[ChatRequest]:
    """Return requests of text whose answers go on for `tokens` tokens."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    texts = [f"question {index}: what is the use of {index * 37 % 101} words?" for index in range(count)]
    return [ChatRequest((Message("user", (TextPart(text),)),), sampling) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="held-out pictures")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), metavar="NAME")
    parser.add_argument("--agreement", type=Path, metavar="FOLDER", help="checkpoint of random weights")
    options = parser.parse_args()
    made = cases(options.n)
    asked = [request(case) for case in made]
    for form in options.forms:
        texts = asyncio.run(answers(None, FORMS[form], asked))
        total, right = Counter[str](), Counter[str]()
        for case, text in zip(made, texts, strict=True):
            for row in (case.rows[0], "all"):
                total[row] += 1
                right[row] += text.strip() == case.expected
        rows = ", ".join(f"{row} {right[row]}/{total[row]} ({100 * right[row] / total[row]:.1f} %)" for row in total)
        print(f"{form}: {rows}", flush=True)
    if options.agreement:
        known: list[str] | None = None
        for form in options.forms:
            texts = asyncio.run(answers(str(options.agreement), FORMS[form], questions(64, 32)))
            known = known or texts
            words = [(one.split(), other.split()) for one, other in zip(texts, known, strict=True)]
            same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), 32) for pair in words]
            first, length = sum(count > 0 for count in same), sum(same) / len(same)
            print(
                f"{form}: first token as float32's in {first} of {len(same)}, {length:.1f} of 32 tokens before another"
            )


if __name__ == "__main__":
    main()
