"""Draws product pictures from a seed, for the training and the tests of the bundled model.

    python -m qvl.tiny.render OUT_DIR --n 12 --seed 0
    python -m qvl.tiny.render OUT_DIR --n 600 --difficulty 0.8 --unknown-brands 0.15

A picture shows one to four identical products of one category and colour, with the brand on a large plate above or
below them. The same product, seed and size give the same pixels, and the same boxes, on every machine. `difficulty`
lays noise and other things over them (`harder`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from qvl.tiny import font
from qvl.tiny.harder import make_harder, unknown_brand
from qvl.tiny.shapes import SHAPES, Pen, Rgb

CATEGORIES: Final = tuple(SHAPES)
COLORS: Final[dict[str, Rgb]] = {
    "red": (205, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (250, 220, 40),
    "green": (30, 150, 60),
    "blue": (30, 80, 205),
    "purple": (120, 40, 160),
    "pink": (250, 140, 185),
    "brown": (120, 72, 35),
    "black": (28, 28, 30),
    "white": (248, 248, 246),
}
BRANDS: Final = (
    "NORVIK", "ZELPHO", "QUBANA", "TIMORA", "HAXLEY", "WUVEX",
    "PODARI", "KASUMO", "BRIXOL", "GEMUTO", "JUPEK", "FYLDEN",
)  # fmt: skip
MAX_COUNT: Final = 4
LANGUAGES: Final = ("en", "zh", "pt", "es")


def _by_language(keys: Iterable[str], **words: str) -> dict[str, dict[str, str]]:
    """Return the name of each key in English, which is the key itself, and in the languages of `words`."""
    english = list(keys)
    return {"en": dict(zip(english, english, strict=True))} | {
        language: dict(zip(english, names.split(), strict=True)) for language, names in words.items()
    }


CATEGORY_NAMES: Final = _by_language(
    CATEGORIES,
    zh="杯子 鞋 瓶子 衬衫 包 帽子 灯 手表 椅子 手机",
    pt="caneca sapato garrafa camisa bolsa chapéu luminária relógio cadeira telefone",
    es="taza zapato botella camisa bolso sombrero lámpara reloj silla teléfono",
)
COLOR_NAMES: Final = _by_language(
    COLORS,
    zh="红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 黑色 白色",
    pt="vermelho laranja amarelo verde azul roxo rosa marrom preto branco",
    es="rojo naranja amarillo verde azul morado rosa marrón negro blanco",
)

_NO_BRAND_SHARE = 0.08
_NO_PRODUCT_SHARE = 0.05
_CENTRES: Final[dict[int, tuple[tuple[float, float], ...]]] = {
    1: ((0.5, 0.5),),
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)),
    4: ((0.27, 0.26), (0.73, 0.26), (0.27, 0.74), (0.73, 0.74)),
}
_SIDES: Final = {1: 0.66, 2: 0.43, 3: 0.3, 4: 0.34}


@dataclass(frozen=True, slots=True)
class DrawnProduct:
    """The product on a picture. `brand` is None if there is no plate; `count` is 1 to 4.

    Raises ValueError for a category, colour or count that cannot be drawn, and for a brand with letters outside A-Z.
    """

    brand: str | None
    category: str
    color: str
    count: int = 1

    def __post_init__(self) -> None:
        if self.category not in SHAPES:
            raise ValueError(f"unknown category {self.category!r}; known: {', '.join(SHAPES)}")
        if self.color not in COLORS:
            raise ValueError(f"unknown color {self.color!r}; known: {', '.join(COLORS)}")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"invalid count {self.count}: must be 1 to {MAX_COUNT}")
        if self.brand is not None and (not self.brand or not set(self.brand) <= set(font.GLYPHS)):
            raise ValueError(f"invalid brand {self.brand!r}: letters must be A-Z")


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the drawing; right and bottom are the first pixels outside."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """An RGB picture and where things are on it.

    `brand_box` is the plate that the brand is written on, its border included, or None without a plate. `product_boxes`
    has one box for each product: column by column from the left, and from top to bottom in a column.
    """

    image: Image.Image
    brand_box: Box | None = None
    product_boxes: tuple[Box, ...] = ()


def labels(product: DrawnProduct | None, language: str = "en") -> dict[str, object]:
    """Return the expected fields of `analyze()` for a picture: keys in English, values in `language`."""
    if product is None:
        return {"brand": None, "category": None, "attributes": {}}
    return {
        "brand": product.brand,
        "category": CATEGORY_NAMES[language][product.category],
        "attributes": {"color": COLOR_NAMES[language][product.color], "count": str(product.count)},
    }


def draw(product: DrawnProduct | None, seed: int, size: tuple[int, int] = (512, 512)) -> Image.Image:
    """Return an RGB picture of `size` (width, height) pixels; without a product it shows only a pattern."""
    return draw_with_boxes(product, seed, size).image


def draw_with_boxes(product: DrawnProduct | None, seed: int, size: tuple[int, int] = (512, 512)) -> Drawing:
    """Return the picture of `draw` with the exact boxes of the brand's plate and of every product."""
    dice = random.Random(f"picture-{seed}")
    if product is None:
        return Drawing(_nothing(dice, size))
    image = _background(dice, size)
    side = float(min(size))
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    left += dice.uniform(-0.4, 0.4) * (size[0] - side)
    top += dice.uniform(-0.4, 0.4) * (size[1] - side)
    shelf_top = top + side * 0.02
    shelf_height = side * 0.96
    brand_box = None
    if product.brand is not None:
        plate_height = side * 0.23
        shelf_height -= plate_height
        plate_top = top + side * dice.uniform(0.015, 0.045)
        if dice.random() < 0.5:
            shelf_top += plate_height + side * 0.02
        else:
            plate_top += side * 0.72
        brand_box = _plate(image, product.brand, dice, left + side / 2, plate_top, side)
    boxes = _products(image, product, dice, left, shelf_top, side, shelf_height)
    return Drawing(image, brand_box, tuple(boxes))


def sample(
    seed: int, size: tuple[int, int] = (512, 512), *, difficulty: float = 0.0, unknown_brands: float = 0.0
) -> tuple[DrawnProduct | None, Image.Image]:
    """Return a random product and its picture; every field is uniform and independent of the others.

    Args:
        difficulty: 0 to 1, as of `make_harder`.
        unknown_brands: the share of brands that are replaced by words which no training has shown, 0 to 1.
    """
    product = sample_product(random.Random(f"product-{seed}"))
    dice = random.Random(f"brand-{seed}")
    if product is not None and product.brand is not None and dice.random() < unknown_brands:
        product = replace(product, brand=unknown_brand(dice, BRANDS))
    return product, make_harder(draw(product, seed, size), seed, difficulty)


def sample_product(dice: random.Random) -> DrawnProduct | None:
    """Return a product with uniform independent fields, 8 % without a brand; None in 5 % of the cases."""
    if dice.random() < _NO_PRODUCT_SHARE:
        return None
    brand = None if dice.random() < _NO_BRAND_SHARE else dice.choice(BRANDS)
    return DrawnProduct(brand, dice.choice(CATEGORIES), dice.choice(tuple(COLORS)), dice.randint(1, MAX_COUNT))


def _products(
    image: Image.Image, product: DrawnProduct, dice: random.Random, left: float, top: float, width: float, height: float
) -> list[Box]:
    fill = _vary(COLORS[product.color], dice, 9)
    dark = sum(fill) < 150
    line = (95, 95, 100) if dark else (40, 40, 45)
    shade = _mix(fill, (255, 255, 255), 0.28) if sum(fill) < 330 else _mix(fill, (0, 0, 0), 0.2)
    side = _SIDES[product.count] * width * dice.uniform(0.92, 1.04)
    canvas, shape = ImageDraw.Draw(image), SHAPES[product.category]
    boxes = {}
    for x, y in _CENTRES[product.count]:
        centre_x = left + width * (x + dice.uniform(-0.02, 0.02))
        centre_y = top + height * y + width * dice.uniform(-0.015, 0.015)
        pen = Pen(canvas, centre_x - side / 2, centre_y - side / 2, side, fill, line, shade)
        shape(pen)
        boxes[x, y] = _painted(image.size, shape, pen)
    return [boxes[centre] for centre in sorted(boxes)]


def _painted(size: tuple[int, int], shape: Callable[[Pen], None], pen: Pen) -> Box:
    """Return the box of the pixels that `shape` paints with `pen`, by painting it alone on an empty canvas."""
    alone, white = Image.new("RGB", size), (255, 255, 255)
    shape(replace(pen, canvas=ImageDraw.Draw(alone), fill=white, line=white, shade=white))
    return _seen(alone)


def _seen(alone: Image.Image) -> Box:
    box = alone.getbbox()
    if box is None:
        raise ValueError(f"a picture of {alone.width} x {alone.height} pixels is too small to show anything")
    return box


def _plate(image: Image.Image, brand: str, dice: random.Random, centre: float, top: float, side: float) -> Box:
    canvas = ImageDraw.Draw(image)
    cells = font.width_in_cells(brand)
    cell = min(side * dice.uniform(0.0235, 0.0255), side * 0.92 / cells)
    width, height = cell * (cells + 2), cell * (font.CELLS_HIGH + 1.6)
    left = centre - width / 2 + dice.uniform(-1, 1) * max(0.0, side - width) * 0.3
    paper = _vary((246, 244, 238), dice, 8)
    ink = dice.choice(((20, 20, 24), (24, 34, 84), (84, 20, 24)))
    plate = (left, top, left + width, top + height)
    canvas.rectangle(plate, fill=paper, outline=(120, 120, 120))
    font.write(canvas, brand, left + cell, top + cell * 0.8, cell, ink)
    alone = Image.new("1", image.size)
    ImageDraw.Draw(alone).rectangle(plate, fill=1)
    return _seen(alone)


def _background(dice: random.Random, size: tuple[int, int]) -> Image.Image:
    base = dice.randint(150, 215)
    tint = tuple(base + dice.randint(-16, 16) for _ in range(3))
    other = tuple(base + dice.randint(-30, 30) for _ in range(3))
    kind = dice.randrange(4)
    image = Image.new("RGB", size, tint)
    if kind == 1:
        image = _gradient(tint, other, size, vertical=dice.random() < 0.5)
    elif kind == 2:
        floor = round(size[1] * dice.uniform(0.5, 0.8))
        ImageDraw.Draw(image).rectangle((0, floor, size[0], size[1]), fill=other)
    elif kind == 3:
        image = _grain(image, dice, 10)
    return image


def _nothing(dice: random.Random, size: tuple[int, int]) -> Image.Image:
    colours = [tuple(dice.randint(0, 255) for _ in range(3)) for _ in range(6)]
    kind = dice.randrange(4)
    if kind == 0:
        return _grain(Image.new("RGB", size, (128, 128, 128)), dice, 127)
    if kind == 1:
        return _gradient(colours[0], colours[1], size, vertical=dice.random() < 0.5)
    image = Image.new("RGB", size, colours[0])
    canvas = ImageDraw.Draw(image)
    if kind == 2:
        pitch = max(4, round(min(size) * dice.uniform(0.06, 0.2)))
        for start in range(0, size[0] + size[1], pitch * 2):
            canvas.polygon(
                ((start - size[1], size[1]), (start, 0), (start + pitch, 0), (start + pitch - size[1], size[1])),
                fill=colours[1],
            )
        return image
    for colour in colours[1:]:
        x, y = dice.uniform(0, size[0]), dice.uniform(0, size[1])
        radius = min(size) * dice.uniform(0.1, 0.35)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _gradient(first: Sequence[int], last: Sequence[int], size: tuple[int, int], *, vertical: bool) -> Image.Image:
    width, height = size
    ramp = np.linspace(0.0, 1.0, height if vertical else width, dtype=np.float64)[:, None]
    line = np.rint(np.asarray(first) * (1 - ramp) + np.asarray(last) * ramp).astype(np.uint8)
    pixels = np.broadcast_to(line[:, None] if vertical else line[None], (height, width, 3))
    return Image.fromarray(np.ascontiguousarray(pixels))


def _grain(image: Image.Image, dice: random.Random, strength: int) -> Image.Image:
    width, height = image.size
    noise = np.frombuffer(dice.randbytes(width * height), dtype=np.uint8).reshape(height, width, 1)
    scaled = (noise.astype(np.int32) - 128) * strength // 128
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int32) + scaled, 0, 255).astype(np.uint8))


def _vary(colour: Rgb, dice: random.Random, amount: int) -> Rgb:
    red, green, blue = (min(255, max(0, part + dice.randint(-amount, amount))) for part in colour)
    return red, green, blue


def _mix(colour: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _box_labels(drawing: Drawing) -> dict[str, object]:
    """Return the boxes of a drawing as labels: of the fields (the products' are one box around all), and the brand."""

    def told(boxes: Sequence[Box]) -> dict[str, int] | None:
        if not boxes:
            return None
        left, top, right, bottom = zip(*boxes, strict=True)
        return {"x1": min(left), "y1": min(top), "x2": max(right), "y2": max(bottom)}

    brand = told(() if drawing.brand_box is None else (drawing.brand_box,))
    around = told(drawing.product_boxes)
    return {"evidence": {"brand": brand, "category": around, "attributes": around}, "the brand": brand}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `--n` pictures and `labels.jsonl` (image, and the analysis in English as expected) into a folder."""
    parser = argparse.ArgumentParser(prog="python -m qvl.tiny.render", description="Draw labelled product pictures.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--n", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=float, default=0.0, help="noise and things in the way, 0 to 1")
    parser.add_argument("--unknown-brands", type=float, default=0.0, help="share of brands never trained on, 0 to 1")
    parser.add_argument("--boxes", action="store_true", help="label the boxes of `evidence` and of `the brand` too")
    options = parser.parse_args(arguments)
    for name in ("difficulty", "unknown_brands"):
        if not 0.0 <= getattr(options, name) <= 1.0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 0 to 1")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    with (options.out_dir / "labels.jsonl").open("w", encoding="utf-8") as lines:
        for seed in range(options.seed, options.seed + options.n):
            product, image = sample(seed, difficulty=options.difficulty, unknown_brands=options.unknown_brands)
            name = f"{seed:06d}.png"
            image.save(options.out_dir / name)
            expected = labels(product) | (_box_labels(draw_with_boxes(product, seed)) if options.boxes else {})
            lines.write(json.dumps({"image": name, "expected": expected}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
