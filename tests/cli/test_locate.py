"""`qvl locate`, and `qvl analyze --evidence`: tables, JSON lines, overlays, and one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.scripted_endpoint import ScriptedEndpoint, Text

FOUND = [{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}, {"bbox_2d": [0, 0, 1500, 9], "label": "lid"}]


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint(Text(json.dumps(FOUND)), models=["Qwen3-VL-8B"]) as endpoint:
        yield endpoint


@pytest.fixture
def model(endpoint: ScriptedEndpoint) -> list[str]:
    return ["-m", "openai:Qwen3-VL-8B", "--base-url", endpoint.url, "-O", "probe=false"]


def test_locate_tells_pixels_keeps_the_answer_and_draws_it(qvl, picture, model, tmp_path: Path) -> None:
    drawing = tmp_path / "out.png"
    ran = qvl("locate", picture, "the brand", "lid", "--overlay", str(drawing), *model)
    assert ran.code == 0
    for word in (
        "the brand",
        "16, 6 – 32, 18",
        "cut at the edge",
        "note: cut at the picture's edges: [0, 0, 1500, 9] for 'lid'",
    ):
        assert word in " ".join(ran.out.split()).replace("│ │ │ ", "")
    with Image.open(drawing) as image:
        assert image.format == "PNG"
    report = tmp_path / "report.html"
    again = qvl("locate", picture, "the brand", "lid", "--json", "--html", str(report), *model)
    (line,) = again.lines
    assert line["cache"] == "hit"
    box = line["located"][0]["box"]
    assert (box["x1"], box["y1"], box["x2"], box["y2"]) == (16, 6, 32, 18)
    assert box["relative"] == [0.25, 0.125, 0.5, 0.375]
    assert "<svg" in report.read_text(encoding="utf-8")
    svg = tmp_path / "out.svg"
    assert qvl("locate", picture, "the brand", "lid", "--overlay", str(svg), *model).code == 0
    assert svg.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ",), "targets[0] is empty"),
        (("lid", "Lid"), "'Lid' is named twice"),
        (("lid", "--overlay", "out.jpg"), "neither PNG nor SVG"),
        (("lid", "--overlay", "nowhere/out.png"), "--overlay nowhere/out.png"),
        (("lid", "-p", "temperature=1"), "locate() has no parameter 'temperature'"),
        (("lid", "-O", "box_convention=feet"), "unknown box convention 'feet'"),
        ((), "Missing argument"),
    ],
)
def test_wrong_use_is_one_line(qvl, picture, model, arguments: tuple[str, ...], message: str) -> None:
    ran = qvl("locate", picture, *arguments, *model)
    assert ran.code == 2
    assert message in ran.error


def test_a_second_picture_is_no_target(qvl, picture, model) -> None:
    assert "is a picture, not what to locate" in qvl("locate", picture, picture, "lid", *model).error


def test_evidence_stands_beside_the_fields(qvl, picture, model, endpoint: ScriptedEndpoint) -> None:
    evidence = {"brand": [250, 125, 500, 375], "category": None, "attributes": None}
    answer = {"brand": "NORVIK", "category": "mug", "attributes": {}, "evidence": evidence}
    endpoint.script.clear()
    endpoint.say(Text(json.dumps(answer)))
    assert "16, 6 – 32, 18" in qvl("analyze", picture, "--evidence", *model).out
    (line,) = qvl("analyze", picture, "--evidence", "--json", *model).lines
    assert line["cache"] == "hit"
    assert "evidence" not in line["analysis"]
    assert line["evidence"]["brand"]["box"]["x1"] == 16
    assert line["evidence"]["category"] is None
