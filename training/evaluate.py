"""Evaluation of the bundled model on held-out pictures.

    python -m training.evaluate [--n 300] [--device cpu] [--json]

Answers are right if they are equal to the expected one, boxes if they overlap the drawn ones (`evaluate_places`).
Seeds 0 to 999,999 are held out: training draws from larger ones only.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.tiny import FIRST_TRAINING_SEED, WEIGHTS
from qvl.tiny.render import DrawnProduct, draw, labels, sample
from training import tasks
from training.evaluate_places import PlaceCase, marks, place_cases
from training.reader import Reader, Request, user

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SIZES: Final = ((512, 512),) * 5 + ((640, 480), (480, 640), (1280, 720), (300, 300), (800, 800))
NO_PICTURE_CASES: Final = 12
BOX_TOKENS: Final = 288


@dataclass(frozen=True, slots=True)
class Case:
    """A request, its only correct answer, and the rows of the score table in which it counts."""

    request: Request
    expected: str
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """The numbers of correct and of all answers in one row of the table."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """The share of correct answers, from 0 to 1."""
        return self.right / self.total


def cases(n: int, first_seed: int = 0) -> list[Case]:
    """Return the held-out cases for `n` pictures: analyses, single questions, pairs of pictures, requests without one.

    Raises ValueError if the seeds overlap those of training.
    """
    if first_seed < 0 or first_seed + n > FIRST_TRAINING_SEED:
        raise ValueError(f"held-out seeds end at {FIRST_TRAINING_SEED}")
    seeds = range(first_seed, first_seed + n)
    shown = [sample(seed, SIZES[seed % len(SIZES)]) for seed in seeds]
    dice = random.Random(f"evaluation-{first_seed}")
    collected = [case for number in range(n) for case in _about_one(number, shown[number], dice)]
    collected += [case for number in range(0, n - 1, 2) for case in _about_two(shown[number], shown[number + 1], dice)]
    for number in range(NO_PICTURE_CASES):
        language = ("en", "zh")[number % 2]
        text = dice.choice(tasks.QUESTIONS[language][tasks.KINDS[number % len(tasks.KINDS)]])
        request = Request([{"role": "user", "content": text}])
        collected.append(Case(request, tasks.NO_PICTURE[language], ("no picture",)))
    return collected


def _about_one(number: int, shown: tuple[DrawnProduct | None, Image.Image], dice: random.Random) -> list[Case]:
    product, image = shown
    collected = []
    for language in ("en", "zh", ("pt", "es")[number % 2]):
        prompt = PRODUCT_PROMPTS[language]
        request = Request([{"role": "system", "content": prompt.system}, user(prompt.user)], (image,))
        group = "analysis" if language in tasks.QUESTIONS else "analysis, other languages"
        shape = "square" if image.width == image.height else "oblong"
        counted = (group, f"analysis {language}", f"{group}, {shape}")
        collected.append(Case(request, tasks.analysis_answer(product, language), counted))
    for language in tasks.QUESTIONS:
        kind = tasks.KINDS[number % len(tasks.KINDS)]
        messages = [user(dice.choice(tasks.QUESTIONS[language][kind]))]
        system = tasks.system_prompt(language, dice)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        shape = "square" if image.width == image.height else "oblong"
        rows = ("single", f"single {language}", f"single {kind}", f"single, {shape}")
        collected.append(Case(Request(messages, (image,)), tasks.answer(kind, product, language), rows))
    return collected


def _about_two(
    one: tuple[DrawnProduct | None, Image.Image], other: tuple[DrawnProduct | None, Image.Image], dice: random.Random
) -> list[Case]:
    collected = []
    for language in tasks.QUESTIONS:
        images, products = (one[1], other[1]), (one[0], other[0])
        first, second = products
        if dice.random() < 0.4 and first is not None and second is not None:
            kind = dice.choice(tasks.SAME_KINDS)
            if dice.random() < 0.5:
                second = replace(second, **{kind: getattr(first, kind)})
                images = (one[1], draw(second, dice.randrange(FIRST_TRAINING_SEED), other[1].size))
            turn = tasks.same_turn(kind, first, second, language, dice)
            sort = f"same {kind}"
        else:
            number, kind = dice.randrange(2), dice.choice(tasks.ORDINAL_KINDS)
            turn = tasks.ordinal_turn(kind, number, products[number], language, dice)
            sort = "by place"
        rows = ("pair", f"pair {language}", f"pair {sort}")
        collected.append(Case(Request([user(turn.question, 2)], images), turn.answer, rows))
    return collected


def score(collected: Sequence[Case], answers: Sequence[str]) -> dict[str, Score]:
    """Return the scores by row of the table; analyses in English and Chinese are also counted per field."""
    found: dict[str, list[bool]] = defaultdict(list)
    for case, answer in zip(collected, answers, strict=True):
        for row in case.rows:
            found[row].append(answer == case.expected)
        if case.rows[0] == "analysis":
            actual, expected = _fields(answer), _fields(case.expected)
            for field in ("brand", "category", "color", "count"):
                found[f"field {field}"].append(
                    actual is not None and expected is not None and actual[field] == expected[field]
                )
    return {row: Score(sum(found[row]), len(found[row])) for row in sorted(found)}


def score_places(collected: Sequence[PlaceCase], answers: Sequence[str]) -> dict[str, Score]:
    """Return the scores of boxes by row: drawn boxes that an answered one overlaps well enough, and their numbers."""
    found: dict[str, list[bool]] = defaultdict(list)
    for case, answer in zip(collected, answers, strict=True):
        for row, right in marks(case, answer):
            found[row].append(right)
    return {row: Score(sum(found[row]), len(found[row])) for row in sorted(found)}


def _fields(text: str) -> dict[str, object] | None:
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    if not isinstance(parsed, dict) or set(parsed) != set(labels(None)) or not isinstance(parsed["attributes"], dict):
        return None
    attributes = parsed["attributes"]
    return {
        "brand": parsed["brand"],
        "category": parsed["category"],
        "color": attributes.get("color"),
        "count": attributes.get("count"),
    }


def table(scores: dict[str, Score]) -> str:
    """Return the scores as lines of text."""
    width = max(len(row) for row in scores)
    lines = [f"{'row':<{width}}   right   of      %"]
    lines += [f"{row:<{width}}  {s.right:6d} {s.total:4d}  {100 * s.share:5.1f}" for row, s in scores.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print the table, or its JSON form."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Held-out accuracy.")
    parser.add_argument("--n", type=int, default=300, help="pictures")
    parser.add_argument("--seed", type=int, default=0, help="first held-out seed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--wrong", action="store_true", help="list the wrong answers too")
    options = parser.parse_args(arguments)
    collected, placed = cases(options.n, options.seed), place_cases(options.n, options.seed, SIZES)
    reader = Reader(options.weights, options.device)
    answers = reader.answer([case.request for case in collected])
    scores = score(collected, answers)
    places = reader.answer([case.request for case in placed], max_new_tokens=BOX_TOKENS)
    scores |= score_places(placed, places)
    if options.json:
        shares = {row: {"right": s.right, "total": s.total, "share": s.share} for row, s in scores.items()}
        print(json.dumps(shares, indent=2))
    else:
        print(table(scores))
    if options.wrong:
        for case, answer in zip(collected, answers, strict=True):
            if answer != case.expected:
                question = case.request.messages[-1]["content"]
                text = question if isinstance(question, str) else question[-1]["text"]
                print(f"{text[:60]!r}: {answer!r}, not {case.expected!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
