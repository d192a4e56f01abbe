"""Boxes of the bundled model, calibrated by the commands of the README and used by each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qvl.tiny import render

from .conftest import Ran


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drawn_labels_calibrate_boxes_which_analyze_and_locate_then_tell(
    qvl: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QVL_MODEL")
    render.main([str(folder / "shelf"), "--n", "70", "--boxes", "--difficulty", "0.3"])
    labels = str(folder / "shelf" / "labels.jsonl")
    options = ("--evidence", "--locate", "the brand", "--field", "brand", "--field", "evidence.brand")
    made = qvl("calibrate", labels, *options, "-o", "cal.json", "--report", "page.html")
    assert made.code == 0, made.err
    assert "evidence.brand" in made.out
    assert "the brand" in made.out
    assert "evidence.brand: reliability" in Path("page.html").read_text()
    picture = str(folder / "shelf" / "000000.png")
    raw = qvl("locate", picture, "the brand", "--json").lines[0]["located"][0]
    sure = qvl("locate", picture, "the brand", "--calibration", "cal.json", "--json").lines[0]["located"][0]
    assert sure["box"] == raw["box"]
    assert sure["raw_confidence"] == raw["confidence"]
    assert sure["confidence_method"] == "calibrated"
    analysed = qvl("analyze", picture, "--evidence", "--calibration", "cal.json", "--json").lines[0]
    assert analysed["evidence"]["brand"]["confidence_method"] == "calibrated"
    assert json.loads(Path("cal.json").read_text())["locations"]["targets"].keys() == {"the brand"}
