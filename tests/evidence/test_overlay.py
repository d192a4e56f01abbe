"""Overlays: marks at the pixels of the box, readable on any picture, with labels that are words and never markup."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageColor

from qvl import Box, Located, Locations, Pipeline, Point
from qvl.errors import ConfigError
from qvl.evidence.marks import COLOURS
from qvl.media import gate
from qvl.types import ChatRequest, Choice, Result
from tests.evidence.drawn import drawn
from tests.pipeline.conftest import TalkingBackend

_SIDES = (("x", "width"), ("y", "height"))
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<img src=x onerror="alert(1)">&\x00\x1b[31m]]>'


def found(image: Image.Image | bytes, *items: Located, max_pixels: int = 2**20) -> Locations:
    picture = gate.load(image).fit(max_pixels)
    return Locations(items, Result((Choice(text="[]"),), pictures=(picture,)))


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("ground", ["white", "black", *COLOURS])
def test_a_box_is_seen_on_every_ground(ground: str) -> None:
    image = Image.new("RGB", (600, 400), ground)
    drawing = pixels(found(image, Located("it", Box(100, 80, 500, 300, 600, 400))).overlay())
    assert drawing.shape == (400, 600, 3)
    across = drawing[200, 90:120]
    # From the ground to the inside there is a light line between two black ones.
    assert (across == 0).all(axis=1).any()
    assert (across == ImageColor.getrgb(COLOURS[0])).all(axis=1).any()
    assert (drawing[200, 120:480] == ImageColor.getrgb(ground)).all()
    assert (drawing[350:, 120:480] == ImageColor.getrgb(ground)).all()


@pytest.mark.parametrize("max_pixels", [40_000, 10**7])
def test_marks_lie_where_the_box_is_also_on_a_turned_and_smaller_picture(max_pixels: int) -> None:
    data = drawn((900, 700), (200, 100, 600, 500), 6, "PNG")
    drawing = pixels(found(data, Located("it", Box(200, 100, 600, 500, 900, 700)), max_pixels=max_pixels).overlay())
    coloured = np.argwhere((drawing == ImageColor.getrgb(COLOURS[0])).all(axis=2))
    height, width, _ = drawing.shape
    # The label is above the box, as wide as its words.
    assert abs(coloured[:, 1].min() * 900 / width - 200) < 900 / width
    assert abs(coloured[:, 1].max() * 900 / width - 600) < 2 * 900 / width
    assert abs(coloured[:, 0].max() * 700 / height - 500) < 2 * 700 / height


def test_a_small_picture_is_enlarged_so_that_labels_fit() -> None:
    result = found(Image.new("RGB", (40, 24)), Located("the brand", Box(5, 5, 30, 20, 40, 24), confidence=0.5))
    assert pixels(result.overlay()).shape[0] >= 320


def test_labels_are_words_and_no_markup() -> None:
    result = found(
        Image.new("RGB", (300, 200)),
        Located(HOSTILE, Box(10, 10, 100, 100, 300, 200), confidence=0.973),
        Located("品牌", point=Point(200, 150, 300, 200)),
    )
    svg = ElementTree.fromstring(result.overlay_svg())
    assert svg.get("viewBox") == "0 0 300 200"
    assert [text.text for text in svg.iter(f"{SVG}text")] == ['<img src=x onerror="alert(1)">& [31m]]> 97%', "品牌"]
    assert not [node for node in svg.iter() if node.tag == f"{SVG}img"]
    assert "<img src=x" not in result._repr_html_()
    assert "\x1b" not in result._repr_html_()
    assert pixels(result.overlay()).any()


def test_labels_of_one_place_stand_beside_each_other() -> None:
    where = Box(100, 100, 300, 180, 400, 300)
    result = found(Image.new("RGB", (400, 300)), *[Located(name, where) for name in ("category", "attributes", "it")])
    svg = ElementTree.fromstring(result.overlay_svg())
    plates = [node for node in svg.iter(f"{SVG}rect") if node.get("fill") != "none"]
    spans = [[(float(one.get(at, "")), float(one.get(size, ""))) for at, size in _SIDES] for one in plates]
    assert len(spans) == 3
    for number, one in enumerate(spans):
        for other in spans[:number]:
            assert any(a + la <= b or b + lb <= a for (a, la), (b, lb) in zip(one, other, strict=True))


def test_an_analysis_draws_its_evidence_and_a_report_shows_it() -> None:
    answer = {"brand": "NORVIK", "category": None, "attributes": {}}
    evidence = {"brand": [100, 100, 500, 500], "category": None, "attributes": None}

    def reply(request: ChatRequest) -> str:
        return json.dumps({**answer, **({"evidence": evidence} if "evidence" in request.messages[-1].text else {})})

    backend = TalkingBackend("Qwen3-VL-8B", reply=reply)
    image = Image.new("RGB", (400, 400), "gray")
    with Pipeline(backend=backend, cache="off") as pipe:
        result = pipe.analyze_result(image, evidence=True)
        plain = pipe.analyze_result(image)
        (item,) = pipe.map([image], evidence=True)
    assert result.overlay() == result.value.overlay()
    assert "<svg" in result._repr_html_()
    assert "<svg" in result.value._repr_html_()
    assert "<svg" not in plain.value._repr_html_()
    assert item.value is not None
    with pytest.raises(ConfigError, match=r"let its pictures go \(.*keep_pictures"):
        item.value.overlay()
    with pytest.raises(ConfigError, match="there is no picture 1"):
        result.overlay(1)
