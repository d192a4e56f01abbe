"""Evaluation of the bundled model's boxes: how many overlap the drawn ones well enough, on held-out pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.tiny import FIRST_TRAINING_SEED
from qvl.tiny.render import draw_with_boxes, labels, sample
from training import places
from training.places import Place
from training.reader import Request, user

if TYPE_CHECKING:
    from collections.abc import Sequence

OVERLAP: Final = 0.8
"""A box is right if its intersection with the drawn one is this share of their union, or more."""


@dataclass(frozen=True, slots=True)
class PlaceCase:
    """A request, the drawn boxes of every key of its answer, and the names of its rows.

    `fields` are the analysis that evidence comes with.
    """

    request: Request
    expected: dict[str, tuple[Place, ...]]
    kind: str
    shape: str
    fields: dict[str, object] | None = None


def place_cases(n: int, first_seed: int, sizes: Sequence[tuple[int, int]]) -> list[PlaceCase]:
    """Return the cases for `n` pictures: the brand, the product, both at once with a thing not there, and evidence."""
    if first_seed < 0 or first_seed + n > FIRST_TRAINING_SEED:
        raise ValueError(f"held-out seeds end at {FIRST_TRAINING_SEED}")
    collected = []
    for seed in range(first_seed, first_seed + n):
        size = sizes[seed % len(sizes)]
        product, image = sample(seed, size)
        shown = places.show(product, draw_with_boxes(product, seed, size))
        shape = "square" if size[0] == size[1] else "oblong"
        absent = next(name for name in ("shoe", "bag") if product is None or name != product.category)
        category = f"the {product.category}" if product is not None else "the mug"
        for targets in (("the brand",), ("the product",), ("the brand", category, f"the {absent}")):
            prompt, _ = places.question(targets, shown)
            drawn = {target: tuple(places.found(target, shown)) for target in targets}
            collected.append(PlaceCase(Request([user(prompt)], (image,)), drawn, "boxes", shape))
        language = ("en", "zh", "en", "pt", "en", "es")[seed % 6]
        messages = [
            {"role": "system", "content": PRODUCT_PROMPTS[language].system},
            user(places.evidence_prompt(language)),
        ]
        around = () if shown.around is None else (shown.around,)
        drawn = {"brand": tuple(places.found("brand", shown)), "category": around, "attributes": around}
        collected.append(PlaceCase(Request(messages, (image,)), drawn, "evidence", shape, labels(product, language)))
    return collected


def read_boxes(case: PlaceCase, answer: str) -> dict[str, list[Place]]:
    """Return the boxes of an answer by label (or by field), in shares of the sides; none of an answer without form."""
    boxes: dict[str, list[Place]] = {}
    try:
        parsed = json.loads(answer)
        if case.kind == "evidence":
            pairs = [(field, box) for field, box in parsed["evidence"].items() if box is not None]
        else:
            pairs = [(entry["label"], entry["bbox_2d"]) for entry in parsed]
        for label, box in pairs:
            left, top, right, bottom = (float(part) / 1000 for part in box)
            boxes.setdefault(label, []).append((left, top, right, bottom))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    return boxes


def overlap(one: Place, other: Place) -> float:
    """Return the intersection over the union of two boxes, 0 to 1."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height) if min(areas) > 0 else 0.0


def marks(case: PlaceCase, answer: str) -> list[tuple[str, bool]]:
    """Return (row, whether right) of every drawn box, and of the answer's number of boxes.

    A drawn box takes the answered box of the same label that overlaps it most; each answered box is taken once.
    """
    answered, marked = read_boxes(case, answer), []
    for label, drawn in case.expected.items():
        left = list(answered.get(label, []))
        thing = "brand" if label.endswith("brand") else "products"
        for box in drawn:
            best = max(left, key=lambda other, box=box: overlap(box, other), default=None)  # type: ignore[misc]
            right = best is not None and overlap(box, best) >= OVERLAP
            if best is not None and right:
                left.remove(best)
            rows = (f"{case.kind} {thing}", f"{case.kind} {thing}, {case.shape}")
            marked += [(row, right) for row in rows]
    counts = {label: len(boxes) for label, boxes in answered.items()}
    expected = {label: len(boxes) for label, boxes in case.expected.items() if boxes}
    marked.append((f"{case.kind}, how many of each", counts == expected))
    if case.kind == "boxes":
        absent = [label for label, drawn in case.expected.items() if not drawn]
        marked += [("boxes, none of what is absent", label not in answered) for label in absent]
    else:
        marked.append(("evidence, its analysis", read_fields(answer) == case.fields))
    return marked


def read_fields(answer: str) -> dict[str, Any] | None:
    """Return an analysis without its evidence, or None if it is no JSON object."""
    try:
        parsed = json.loads(answer)
    except ValueError:
        return None
    return {key: value for key, value in parsed.items() if key != "evidence"} if isinstance(parsed, dict) else None
