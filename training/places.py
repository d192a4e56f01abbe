"""Questions for boxes and points, with the exact prompts of `qvl.evidence.prompts`, and analyses with evidence.

Coordinates are taught in multiples of 10 of 1000. Several products go column by column from the left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.evidence.prompts import evidence_sentence, locate_prompt
from qvl.tiny.render import CATEGORIES, CATEGORY_NAMES, COLORS, labels
from training.tasks import PLURALS, Dialogue, Turn

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from qvl.tiny.render import Box, Drawing, DrawnProduct

BRAND_TARGETS: Final = (
    "the brand", "brand", "the label", "label", "the brand name", "brand name", "the logo", "logo", "the text",
    "the plate", "the brand text", "the name plate", "品牌", "标签",
)  # fmt: skip
PRODUCT_TARGETS: Final = (
    "the product", "product", "the products", "products", "every product", "each product", "all products", "the item",
    "item", "items", "商品",
)  # fmt: skip
ABSENT_TARGETS: Final = (
    "the cat", "a dog", "cap", "the car", "a person", "the price", "the barcode", "a tree", "the face", "cup",
    "the box", "hand",
)  # fmt: skip

# Of the kinds of target. Among several, one that is not there must be learnt as often as alone: else its neighbour's
# places are given for it too.
WEIGHTS_ALONE: Final = (24, 31, 32, 9, 4)
WEIGHTS_AMONG: Final = (20, 25, 22, 25, 10)

Place = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the picture's width and height."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The product on a picture, and where the brand's plate and each product are."""

    product: DrawnProduct | None
    brand: Place | None = None
    products: tuple[Place, ...] = ()

    @property
    def around(self) -> Place | None:
        """The box around all products."""
        if not self.products:
            return None
        left, top, right, bottom = zip(*self.products, strict=True)
        return min(left), min(top), max(right), max(bottom)


def show(product: DrawnProduct | None, drawing: Drawing) -> Shown:
    """Return what a drawing of `product` shows."""
    width, height = drawing.image.size

    def place(box: Box) -> Place:
        left, top, right, bottom = box
        return left / width, top / height, right / width, bottom / height

    brand = None if drawing.brand_box is None else place(drawing.brand_box)
    return Shown(product, brand, tuple(place(box) for box in drawing.product_boxes))


def thousandths(place: Place) -> list[int]:
    """Return a place in thousandths of the sides, rounded to tens."""
    return [round(side * 100) * 10 for side in place]


def found(target: str, shown: Shown) -> list[Place]:
    """Return the places of a target on a picture.

    A target is one of the phrases above, or a category's name: alone, with an article, as a plural, or with a colour.
    """
    if target in BRAND_TARGETS:
        return [] if shown.brand is None else [shown.brand]
    if target in PRODUCT_TARGETS:
        return list(shown.products)
    product = shown.product
    if product is None or target in ABSENT_TARGETS:
        return []
    words = target.removeprefix("the ").removeprefix("a ").split()
    names = {product.category, plural(product.category), CATEGORY_NAMES["zh"][product.category]}
    asked = {(name,) for name in names} | {(product.color, name) for name in names}
    return list(shown.products) if tuple(words) in asked else []


def plural(category: str) -> str:
    """Return a category's plural in English."""
    return PLURALS.get(category, category + "s")


def question(targets: Sequence[str], shown: Shown, *, points: bool = False) -> tuple[str, str]:
    """Return the prompt for boxes (or points) of `targets`, and its answer."""
    answer: list[dict[str, object]] = []
    for target in targets:
        for place in found(target, shown):
            left, top, right, bottom = place
            if points:
                centre = ((left + right) / 2, (top + bottom) / 2) * 2
                answer.append({"point_2d": thousandths(centre)[:2], "label": target})
            else:
                answer.append({"bbox_2d": thousandths(place), "label": target})
    return locate_prompt(targets, points=points), json.dumps(answer, ensure_ascii=False)


def some_targets(shown: Shown, dice: random.Random) -> list[str]:
    """Return one to three different things to look for, most of them on the picture."""
    count = dice.choices((1, 2, 3), weights=(34, 22, 44))[0]
    targets: list[str] = []
    while len(targets) < count:
        target = _some_target(shown, dice, WEIGHTS_ALONE if count == 1 else WEIGHTS_AMONG)
        if target not in targets:
            targets.append(target)
    return targets


def _some_target(shown: Shown, dice: random.Random, weights: Sequence[int]) -> str:
    kind = dice.choices(("brand", "product", "category", "other", "absent"), weights=weights)[0]
    if kind == "brand":
        return dice.choice(BRAND_TARGETS[: 2 if dice.random() < 0.3 else None])
    if kind == "product":
        return dice.choice(PRODUCT_TARGETS[: 2 if dice.random() < 0.3 else None])
    if kind == "absent":
        return dice.choice(ABSENT_TARGETS)
    product = shown.product
    category = dice.choice(CATEGORIES) if product is None or kind == "other" else product.category
    if dice.random() < 0.08:
        return CATEGORY_NAMES["zh"][category]
    name = plural(category) if dice.random() < 0.3 else category
    if dice.random() < 0.25:
        color = dice.choice(tuple(COLORS)) if product is None or dice.random() < 0.4 else product.color
        name = f"{color} {name}"
    return dice.choice(("", "the ", "the " if name.endswith("s") else "a ")) + name


def evidence(shown: Shown) -> dict[str, list[int] | None]:
    """Return the boxes of an analysis' fields: the brand's plate, and the box around all products for the others."""
    brand, around = (None if place is None else thousandths(place) for place in (shown.brand, shown.around))
    return {"brand": brand, "category": around, "attributes": around}


def evidence_prompt(language: str) -> str:
    """Return the user's text of an analysis with evidence."""
    return f"{PRODUCT_PROMPTS[language].user} {evidence_sentence(language)}"


def evidence_answer(shown: Shown, language: str) -> str:
    """Return the JSON answer of an analysis with evidence."""
    return json.dumps(labels(shown.product, language) | {"evidence": evidence(shown)}, ensure_ascii=False)


def analysis(position: int, shown: Shown, language: str) -> Dialogue:
    """Return the dialogue of `analyze(evidence=True)` about the picture at `position` in the pool."""
    turn = Turn(evidence_prompt(language), evidence_answer(shown, language), (position,))
    return Dialogue((turn,), system=PRODUCT_PROMPTS[language].system)
