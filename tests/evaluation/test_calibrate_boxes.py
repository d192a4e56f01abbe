"""Boxes are calibrated like values: labels as boxes, right by how much they overlap."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from qvl import Box, Pipeline
from qvl.calibration import Calibration
from qvl.errors import ConfigError
from qvl.evaluation.calibrate import calibrate, report
from qvl.evaluation.collect import Collector
from qvl.evaluation.compare import Rule, read_rules, right_boxes
from qvl.evaluation.evaluate import Evaluator
from qvl.evaluation.labelled import read_labelled
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.types import JsonObject
from tests.evaluation.shelf import PLACE, TALL, Reader

PLACED = {"brand": json.loads(PLACE), "category": None, "attributes": None}
SEEN = {"brand": "NORVIK", "category": "mug", "attributes": {}, "evidence": PLACED}
FOUND = {"answer": [{"bbox_2d": json.loads(PLACE), "label": "the brand"}]}


def reader(answer: JsonObject = SEEN) -> Reader:
    return Reader(model="qwen3-vl-reader", answer=lambda _: answer)


def box(width: int, *, off: float = 0.0) -> dict[str, float]:
    """What the reader says, in pixels of a picture of `width`; `off` shifts it by a share of the width."""
    return {"x1": (0.25 + off) * width, "y1": 0.1 * TALL, "x2": (0.5 + off) * width, "y2": 0.9 * TALL}


def write_boxes(folder: Path, count: int, seed: int = 0) -> Path:
    """Pictures whose width is the model's confidence; the box is right with the third power of it."""
    dice = np.random.default_rng(seed)
    with (folder / "boxes.jsonl").open("w") as lines:
        for number in range(count):
            width = int(dice.integers(300, 1000))
            Image.new("RGB", (width, TALL), (number % 256, seed, number // 256)).save(folder / f"{number}.png")
            label = box(width, off=0.0 if dice.random() < (width / 1000) ** 3 else 0.5)
            expected = {"evidence": {"brand": label}, "the brand": label}
            lines.write(json.dumps({"image": f"{number}.png", "expected": expected}) + "\n")
    return folder / "boxes.jsonl"


async def made(
    labels: Path, answer: JsonObject, targets: Sequence[str] = (), rules: Sequence[str] = (), *, evidence: bool = False
) -> Calibration:
    async with AsyncPipeline(backend=reader(answer), cache="off") as pipeline:
        lines = read_labelled([str(labels)])
        if not evidence:
            for line in lines:
                line.expected.pop("evidence")
        else:
            for line in lines:
                line.expected.pop("the brand")
        request = {"evidence": True} if evidence else {}
        collector = Collector(pipeline, lines, targets=targets, rules=read_rules(rules), request=request)
        found = await collector.collect()
        calibration, fits = calibrate(collector, found, pipeline.backend.identity())
        measured = report(found, model="reader", files=[], lines=len(lines), fits=fits)
        assert [one.kind for one in measured.fields] == ["box"]
        assert measured.fields[0].raw.ece > measured.fields[0].calibrated.ece
    return Calibration.model_validate_json(calibration.to_text())


@pytest.mark.asyncio
async def test_boxes_beside_fields_get_confidences_that_say_how_often_they_are_right(tmp_path: Path) -> None:
    calibration = await made(write_boxes(tmp_path, 250), SEEN, evidence=True)
    assert calibration.names == ["evidence.brand"]
    picture = Image.new("RGB", (800, TALL))
    with Pipeline(backend=reader(), cache="memory:") as pipe:
        raw = pipe.analyze(picture, evidence=True).evidence
    with Pipeline(backend=reader(), cache="memory:", calibration=calibration) as pipe:
        sure = pipe.analyze(picture, evidence=True).evidence
        silent = pipe.analyze(picture, evidence=True, abstain={"evidence.brand": 0.95})
    assert raw is not None
    assert sure is not None
    assert raw["brand"] is not None
    assert sure["brand"] is not None
    assert raw["brand"].confidence_method is None
    assert sure["brand"].raw_confidence == raw["brand"].confidence == pytest.approx(0.8**3)
    assert sure["brand"].confidence == pytest.approx(0.8**3, abs=0.12)
    assert sure["brand"].to_json()["confidence_method"] == "calibrated"
    assert sure["category"] is None
    assert silent.evidence is not None
    assert silent.evidence["brand"] is None
    assert silent.abstained == {"evidence.brand": "below_threshold"}
    assert silent.brand == "NORVIK"


@pytest.mark.asyncio
async def test_located_boxes_get_them_too_and_the_unsure_are_left_out_with_a_note(tmp_path: Path) -> None:
    calibration = await made(write_boxes(tmp_path, 250), FOUND, ["the brand"])
    picture = Image.new("RGB", (800, TALL))
    with Pipeline(backend=reader(FOUND), cache="memory:") as pipe:
        (raw,) = pipe.locate(picture, "the brand")
    with Pipeline(backend=reader(FOUND), cache="memory:", calibration=calibration) as pipe:
        (sure,) = pipe.locate(picture, "the brand")
        (other,) = pipe.locate(picture, "the handle")
        both = pipe.locate(picture, ["the brand", "the handle"])
    assert sure.raw_confidence == raw.confidence
    assert sure.confidence == pytest.approx(0.8**3, abs=0.12)
    assert sure.confidence_method == "calibrated"
    assert other.confidence_method is None
    assert both[0].confidence_method == "calibrated"
    assert both.result.notes == ("the confidences were calibrated on each target asked for alone",)
    with Pipeline(backend=reader(FOUND), cache="off", calibration=calibration, abstain={"the brand": 0.9}) as pipe:
        silent = pipe.locate(picture, "the brand")
    assert list(silent) == []
    assert any("left out a box for 'the brand': below_threshold" in note for note in silent.result.notes)
    with (
        Pipeline(backend=reader(FOUND), cache="off", calibration=calibration, abstain=0.9) as pipe,
        pytest.raises(ConfigError, match="no calibration of the boxes of 'the handle'"),
    ):
        pipe.locate(picture, "the handle")


@pytest.mark.asyncio
async def test_a_calibration_of_other_coordinates_is_refused(tmp_path: Path) -> None:
    calibration = await made(write_boxes(tmp_path, 60), FOUND, ["the brand"])
    assert calibration.locations is not None
    older = calibration.locations.model_copy(update={"prompt_version": "locate-0-pixels"})
    calibration = calibration.model_copy(update={"locations": older})
    with (
        Pipeline(backend=reader(FOUND), cache="off", calibration=calibration) as pipe,
        pytest.raises(ConfigError, match="another prompt version of locate"),
    ):
        pipe.locate(Image.new("RGB", (800, TALL)), "the brand")


class Part(BaseModel):
    where: Box


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "answer", "options", "expected"),
    [
        (Collector, FOUND, {"targets": ["the brand"]}, lambda label: {"the brand": label}),
        (Collector, SEEN, {"request": {"evidence": True}}, lambda label: {"evidence": {"brand": label}}),
        (Collector, {"where": json.loads(PLACE)}, {"schema": Part}, lambda label: {"where": label}),
        (Evaluator, {"where": json.loads(PLACE)}, {"schema": Part}, lambda label: {"where": label}),
    ],
)
async def test_a_labelled_box_that_is_not_on_its_picture_is_named(
    tmp_path: Path,
    kind: type[Collector],
    answer: JsonObject,
    options: dict[str, Any],
    expected: Callable[[JsonObject], JsonObject],
) -> None:
    Image.new("RGB", (800, TALL)).save(tmp_path / "0.png")
    for label, said in (
        ({**box(800), "x2": 801.5}, "reaches beyond the picture of 800 x 40"),
        ({**box(800), "x1": -1}, "is not a box"),
        ({**box(800), "y2": 1}, "is not a box"),
    ):
        labels = tmp_path / "labels.jsonl"
        labels.write_text(json.dumps({"image": "0.png", "expected": expected(label)}))
        async with AsyncPipeline(backend=reader(answer), cache="off") as pipeline:
            with pytest.raises(ConfigError, match=rf"labels.jsonl:1: the label .* {said}"):
                await kind(pipeline, read_labelled([str(labels)]), **options).collect()


def test_a_labelled_box_counts_for_the_first_that_has_it() -> None:
    one, near, other = box(100), box(100, off=0.05), box(100, off=0.4)
    assert right_boxes([one, other], [one, near, other], Rule("iou", 0.5)) == [True, False, True]
    assert right_boxes([], [one], Rule("iou", 0.5)) == [False]
    assert right_boxes([one], [near], Rule("iou", 0.9)) == [False]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("expected", "what"),
    [
        ({"the brand": [1, 2, 3]}, "is not a box"),
        ({"the brand": {"x1": 5, "y1": 1, "x2": 5, "y2": 9}}, "is not a box"),
        ({"the brand": "here"}, "is not a box"),
        ({"evidence": {"brand": {"x1": 1}}}, "'evidence.brand' is not a box"),
        ({"evidence": {"colour": None}}, "evidence of 'colour', no field"),
        ({"evidence": []}, "`evidence` must be an object"),
        ({"the brand": {"x1": -5, "y1": 2, "x2": 9, "y2": 9}}, "of 'the brand' is not a box"),
        ({"the cap": None}, "'the cap' is not a field"),
    ],
)
async def test_labels_that_are_no_boxes_are_named_before_anything_is_asked(
    expected: JsonObject, what: str, tmp_path: Path
) -> None:
    Image.new("RGB", (800, TALL)).save(tmp_path / "0.png")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": "0.png", "expected": {"the brand": None, **expected}}))
    backend = reader()
    async with AsyncPipeline(backend=backend, cache="off") as pipeline:
        with pytest.raises(ConfigError, match=what):
            Collector(
                pipeline,
                read_labelled([str(tmp_path / "bad.jsonl")]),
                targets=["the brand"],
                request={"evidence": True},
            )
    assert backend.asked == 0
