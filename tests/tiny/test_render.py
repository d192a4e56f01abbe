"""The pictures: the same for a seed everywhere, labelled with what they show, and drawn without a font file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qvl.tiny import font, render
from qvl.tiny.render import (
    BRANDS,
    CATEGORIES,
    COLORS,
    LANGUAGES,
    DrawnProduct,
    draw,
    draw_with_boxes,
    labels,
    sample,
    sample_product,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int32)


def test_a_seed_gives_the_same_picture_again() -> None:
    product = DrawnProduct("NORVIK", "mug", "red", 2)
    assert np.array_equal(pixels(draw(product, 7)), pixels(draw(product, 7)))
    assert not np.array_equal(pixels(draw(product, 7)), pixels(draw(product, 8)))
    assert sample(11)[0] == sample(11)[0]


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (180, 320), (64, 64)])
def test_a_picture_has_the_size_asked_for(size: tuple[int, int]) -> None:
    image = draw(DrawnProduct("ZELPHO", "shoe", "blue", 3), 1, size)
    assert image.size == size
    assert image.mode == "RGB"


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (180, 320), (64, 64)])
def test_the_boxes_hold_what_was_painted_and_nothing_else_changes(size: tuple[int, int]) -> None:
    """The same seed without its plate, or with a product of another colour, differs inside of the boxes only."""
    for seed, category in enumerate(CATEGORIES):
        product = DrawnProduct("KASUMO", category, "red", 1 + seed % 4)
        drawing = draw_with_boxes(product, seed, size)
        assert np.array_equal(pixels(drawing.image), pixels(draw(product, seed, size)))
        assert len(drawing.product_boxes) == product.count
        blue = draw_with_boxes(replace(product, color="blue"), seed, size)
        assert blue.product_boxes == drawing.product_boxes
        assert blue.brand_box == drawing.brand_box
        changed = np.abs(pixels(drawing.image) - pixels(blue.image)).max(-1) > 0
        for left, top, right, bottom in drawing.product_boxes:
            rows, columns = np.nonzero(changed[top:bottom, left:right])
            stroke = 2 + 0.05 * max(right - left, bottom - top)  # the outline keeps its colour
            assert rows.min() <= stroke
            assert columns.min() <= stroke
            assert rows.max() >= bottom - top - 1 - stroke
            assert columns.max() >= right - left - 1 - stroke
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_the_box_of_a_brand_is_its_plate() -> None:
    for seed in range(20):
        drawing = draw_with_boxes(DrawnProduct("NORVIK", "hat", "green", 4), seed, (640, 480))
        assert drawing.brand_box is not None
        left, top, right, bottom = drawing.brand_box
        image = pixels(drawing.image)
        for edge in (image[top, left:right], image[bottom - 1, left:right]):
            assert (edge == 120).all(-1).mean() > 0.6  # a product may stand before the plate
        for edge in (image[top:bottom, left], image[top:bottom, right - 1]):
            assert (edge == 120).all()
        assert (right - left) / (bottom - top) > 3


def test_boxes_go_column_by_column_and_are_absent_with_what_they_hold() -> None:
    drawing = draw_with_boxes(DrawnProduct(None, "phone", "pink", 4), 3)
    assert drawing.brand_box is None
    quarters = [((left + right) // 512, (top + bottom) // 512) for left, top, right, bottom in drawing.product_boxes]
    assert quarters == [(0, 0), (0, 1), (1, 0), (1, 1)]
    nothing = draw_with_boxes(None, 3)
    assert (nothing.brand_box, nothing.product_boxes) == (None, ())


@pytest.mark.parametrize("change", ["brand", "category", "color", "count"])
def test_every_field_reaches_the_pixels(change: str) -> None:
    other = {"brand": "WUVEX", "category": "hat", "color": "green", "count": 3}
    fields = {"brand": "NORVIK", "category": "mug", "color": "red", "count": 1}
    plain = draw(DrawnProduct(**fields), 5)
    changed = draw(DrawnProduct(**{**fields, change: other[change]}), 5)
    assert np.abs(pixels(plain) - pixels(changed)).mean() > 1.0


def test_a_product_is_painted_in_its_colour() -> None:
    for color, rgb in COLORS.items():
        image = pixels(draw(DrawnProduct(None, "shirt", color), 3))
        near = (np.abs(image - np.array(rgb)).max(-1) <= 12).mean()
        assert near > 0.05, color


def test_fields_are_uniform_and_independent() -> None:
    dice = random.Random(0)
    drawn = [product for product in (sample_product(dice) for _ in range(6000)) if product is not None]
    assert 0.93 < len(drawn) / 6000 < 0.97
    unbranded = sum(product.brand is None for product in drawn) / len(drawn)
    assert 0.06 < unbranded < 0.10
    for values, known in (
        ([p.category for p in drawn], CATEGORIES),
        ([p.color for p in drawn], tuple(COLORS)),
        ([p.brand for p in drawn if p.brand], BRANDS),
        ([p.count for p in drawn], (1, 2, 3, 4)),
    ):
        counts = Counter(values)
        assert set(counts) == set(known)
        assert max(counts.values()) < 1.35 * min(counts.values())
    pairs = Counter((p.category, p.color) for p in drawn)
    assert len(pairs) == len(CATEGORIES) * len(COLORS)


def test_names_are_translated_one_to_one() -> None:
    for language in LANGUAGES:
        assert tuple(render.CATEGORY_NAMES[language]) == CATEGORIES
        assert tuple(render.COLOR_NAMES[language]) == tuple(COLORS)
        assert len(set(render.CATEGORY_NAMES[language].values())) == len(CATEGORIES)
        assert len(set(render.COLOR_NAMES[language].values())) == len(COLORS)


def test_labels_keep_english_keys_and_translate_values() -> None:
    product = DrawnProduct("NORVIK", "mug", "red", 2)
    assert labels(product, "zh") == {
        "brand": "NORVIK",
        "category": "杯子",
        "attributes": {"color": "红色", "count": "2"},
    }
    assert labels(None) == {"brand": None, "category": None, "attributes": {}}


@pytest.mark.parametrize(
    "fields",
    [
        {"brand": "norvik", "category": "mug", "color": "red"},
        {"brand": "", "category": "mug", "color": "red"},
        {"brand": "NORVIK", "category": "boat", "color": "red"},
        {"brand": "NORVIK", "category": "mug", "color": "teal"},
        {"brand": "NORVIK", "category": "mug", "color": "red", "count": 5},
    ],
)
def test_a_product_that_cannot_be_drawn_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"brand|category|color|count"):
        DrawnProduct(**fields)  # type: ignore[arg-type]


def test_every_brand_can_be_written_and_glyphs_differ() -> None:
    assert len(set(font.GLYPHS.values())) == 26
    assert all(set(brand) <= set(font.GLYPHS) for brand in BRANDS)


def test_the_command_writes_pictures_and_labels(tmp_path: Path) -> None:
    assert render.main([str(tmp_path), "--n", "3", "--seed", "40"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["image"] for line in lines] == ["000040.png", "000041.png", "000042.png"]
    assert all((tmp_path / line["image"]).is_file() for line in lines)
    assert set(lines[0]["expected"]) == {"brand", "category", "attributes"}


def test_a_share_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--difficulty", "--unknown-brands"):
        with pytest.raises(SystemExit):
            render.main([str(tmp_path), option, "nan"])
        assert f"{option} nan: must be 0 to 1" in capsys.readouterr().err


def test_drawing_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, qvl.tiny.render; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
