"""From labelled pictures to a calibration in use: a backend whose confidences are wrong in a known way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from qvl import Pipeline
from qvl.calibration import Calibration
from qvl.errors import ConfigError
from qvl.evaluation.calibrate import CalibrationReport, calibrate, report
from qvl.evaluation.collect import Collected, Collector
from qvl.evaluation.labelled import read_labelled
from qvl.evaluation.page import html
from qvl.pipeline.async_pipeline import AsyncPipeline
from tests.evaluation.shelf import Reader, write_shelf


async def collected(labels: Path, **options: object) -> tuple[Collector, Collected, AsyncPipeline]:
    async with AsyncPipeline(backend=Reader(), cache="off") as pipeline:
        collector = Collector(pipeline, read_labelled([str(labels)]), **options)  # type: ignore[arg-type]
        return collector, await collector.collect(), pipeline


MADE: dict[Path, tuple[Calibration, CalibrationReport]] = {}


async def made(labels: Path) -> tuple[Calibration, CalibrationReport]:
    if labels not in MADE:
        MADE[labels] = await fitted(labels)
    return MADE[labels]


async def fitted(labels: Path) -> tuple[Calibration, CalibrationReport]:
    collector, found, pipeline = await collected(labels)
    calibration, fits = calibrate(collector, found, pipeline.backend.identity())
    measured = report(found, model="reader:reader-1", files=[str(labels)], lines=found.asked, fits=fits, precision=0.6)
    return calibration, measured


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shelf(tmp_path_factory.mktemp("shelf"), 300)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_calibration_finds_the_truth_behind_wrong_confidences(shelf: Path) -> None:
    calibration, measured = await made(shelf)
    assert calibration.analysis is not None
    curve = calibration.analysis.fields["brand"].curve
    asked = np.linspace(0.35, 0.97, 30)
    distance = np.abs([curve.apply(float(raw)) - raw**3 for raw in asked])
    assert distance.mean() < 0.06
    brand = next(one for one in measured.fields if one.name == "brand")
    assert brand.raw.ece > 0.15
    assert brand.calibrated.ece < 0.06
    assert brand.calibrated.brier < brand.raw.brier
    assert brand.calibrated.ece_interval[0] <= brand.calibrated.ece <= brand.calibrated.ece_interval[1]
    json.dumps(measured.to_json(), allow_nan=False)


@pytest.mark.asyncio
async def test_the_file_says_what_it_was_made_with_and_is_the_same_when_read_again(shelf: Path, tmp_path: Path) -> None:
    calibration, _ = await made(shelf)
    file = tmp_path / "cal.json"
    file.write_text(calibration.to_text())
    assert Calibration.load(file) == calibration
    told = json.loads(file.read_text())
    assert told["backend"] == {"backend": "reader", "model": "reader-1", "revision": None, "dtype": "float32"}
    assert told["analysis"]["prompt_version"] == "product-1"
    assert told["analysis"]["schema"]["title"] == "ProductFields"
    assert set(told["analysis"]["fields"]) == {"brand", "category"}


@pytest.mark.asyncio
async def test_confidences_in_use_are_the_calibrated_ones_and_the_raw_stand_beside_them(
    shelf: Path, tmp_path: Path
) -> None:
    calibration, _ = await made(shelf)
    picture = shelf.parent / "0.png"
    with Pipeline(backend=Reader(), cache=f"sqlite:///{tmp_path}/c.db") as pipe:
        raw = pipe.analyze_result(picture)
    # The same entry of the cache: a calibration is not in the key.
    with Pipeline(backend=Reader(), cache=f"sqlite:///{tmp_path}/c.db", calibration=calibration) as pipe:
        sure = pipe.analyze_result(picture)
    assert sure.result.cache == "hit"
    assert raw.confidence_method == "token_probability_product"
    assert sure.confidence_method == sure.value.confidence_method == "calibrated"
    assert sure.raw_field_confidence == raw.field_confidence
    assert calibration.analysis is not None
    brand = calibration.analysis.fields["brand"].curve.apply(raw.field_confidence["brand"])
    assert sure.field_confidence["brand"] == sure.value.field_confidence["brand"] == brand
    assert sure.raw_confidence == raw.confidence == sure.value.raw_confidence
    assert sure.abstained == {}


@pytest.mark.asyncio
async def test_a_precision_holds_on_fresh_pictures_and_the_rest_is_null_with_the_reason(
    shelf: Path, tmp_path: Path
) -> None:
    calibration, measured = await made(shelf)
    brand = next(one for one in measured.fields if one.name == "brand")
    assert brand.at_precision is not None
    fresh = read_labelled([str(write_shelf(tmp_path, 150, seed=77))])
    with Pipeline(backend=Reader(), cache="off", calibration=calibration) as pipe:
        answers = [pipe.analyze(line.pictures[0], abstain={"brand": brand.at_precision.threshold}) for line in fresh]
    told = [(answer.brand, line) for answer, line in zip(answers, fresh, strict=True) if answer.brand is not None]
    right = sum(line.expected["brand"] == "norvik" for _, line in told)
    assert 30 < len(told) < 100
    assert right / len(told) > 0.55
    silent = next(answer for answer in answers if answer.brand is None)
    assert silent.abstained == {"brand": "below_threshold"}
    assert silent.category == "mug"


class Late(Reader):
    """A backend that is known only once it is open."""

    def peek_identity(self) -> None:
        return None


class Bill(BaseModel):
    seller: str
    total: float | None


@pytest.mark.asyncio
async def test_fields_of_a_schema_of_ones_own_are_calibrated_with_tolerance(tmp_path: Path) -> None:
    labels = write_shelf(tmp_path, 60)
    lines = [json.loads(line) for line in labels.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["expected"] = {"seller": "NORVIK", "total": 12.6 if number % 3 else 99}
    labels.write_text("\n".join(map(json.dumps, lines)))
    from qvl.evaluation.compare import read_rules

    reader = Reader(answer=lambda sure: {"seller": "NORVIK", "total": 12.5})
    async with AsyncPipeline(backend=reader, cache="off") as pipeline:
        options = {"schema": Bill, "rules": read_rules(["total=number:1%"])}
        collector = Collector(pipeline, read_labelled([str(labels)]), **options)  # type: ignore[arg-type]
        found = await collector.collect()
        calibration, _ = calibrate(collector, found, pipeline.backend.identity())
    assert calibration.analysis is not None
    assert calibration.analysis.fields["total"].right == 40
    assert calibration.analysis.fields["seller"].right == 60
    with Pipeline(backend=reader, cache="off", calibration=calibration) as pipe:
        answer = pipe.analyze_result(tmp_path / "0.png", schema=Bill, abstain={"total": 1.0})
        assert answer.value == Bill(seller="NORVIK", total=None)
        assert answer.abstained == {"total": "below_threshold"}
        with pytest.raises(ConfigError, match="the field 'seller' of Bill cannot be null"):
            pipe.analyze(tmp_path / "0.png", schema=Bill, abstain=0.9)


@pytest.mark.asyncio
async def test_too_few_labels_say_how_many_more(tmp_path: Path) -> None:
    collector, found, pipeline = await collected(write_shelf(tmp_path, 30))
    with pytest.raises(ConfigError, match="brand has 30, 20 more are needed"):
        calibrate(collector, found, pipeline.backend.identity())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "reader-2"}, "another model: made with reader-1, used with reader-2"),
        ({"dtype": "bfloat16"}, "another dtype: made with float32, used with bfloat16"),
    ],
)
@pytest.mark.asyncio
async def test_a_calibration_of_another_backend_is_refused_before_anything_is_asked(
    shelf: Path, change: dict[str, str], said: str
) -> None:
    calibration, _ = await made(shelf)
    other = Reader(**change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        AsyncPipeline(backend=other, cache="off", calibration=calibration)
    # Known only when it is open.
    other = Late(**change)  # type: ignore[arg-type]
    pipe = AsyncPipeline(backend=other, cache="off", calibration=calibration)
    with pytest.raises(ConfigError, match=said):
        await pipe.analyze(shelf.parent / "0.png")
    assert other.asked == 0
    await pipe.aclose()


@pytest.mark.asyncio
async def test_a_calibration_of_another_schema_or_language_is_refused(shelf: Path) -> None:
    calibration, _ = await made(shelf)
    async with AsyncPipeline(backend=Reader(), cache="off", calibration=calibration) as pipe:
        with pytest.raises(ConfigError, match="another schema: made with ProductFields, used with Bill"):
            await pipe.analyze(shelf.parent / "0.png", schema=Bill)
        with pytest.raises(ConfigError, match="another language: made with en, used with zh"):
            await pipe.analyze(shelf.parent / "0.png", language="zh")
        plain = await pipe.analyze_result(shelf.parent / "0.png", language="zh", calibrated=False)
        assert plain.confidence_method == "token_probability_product"


def test_abstaining_without_a_calibration_is_refused(tmp_path: Path) -> None:
    write_shelf(tmp_path, 1)
    with pytest.raises(ConfigError, match="abstain needs a calibration"):
        Pipeline(backend=Reader(), abstain=0.9)
    with Pipeline(backend=Reader(), cache="off") as pipe:
        with pytest.raises(ConfigError, match="abstain needs a calibration"):
            pipe.analyze(tmp_path / "0.png", abstain=0.9)
        with pytest.raises(ConfigError, match="abstain needs a calibration"):
            pipe.decide(tmp_path / "0.png", "Is it new?", abstain=0.9)


@pytest.mark.asyncio
async def test_a_backend_without_probabilities_is_refused(tmp_path: Path) -> None:
    async with AsyncPipeline(backend=Reader(logprobs=False), cache="off") as pipeline:
        collector = Collector(pipeline, read_labelled([str(write_shelf(tmp_path, 2))]))
        with pytest.raises(ConfigError, match="tells no probabilities"):
            await collector.collect()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_the_page_has_questions_of_every_script_and_with_signs_of_formulas(shelf: Path) -> None:
    _, measured = await made(shelf)
    name = r"Does it cost $5, $\frobnicate$ or 5元？"
    text = html(replace(measured, fields=[replace(measured.fields[0], name=name)]))
    assert f"{name}: reliability" in text
    assert f"{name}: risk against coverage" in text
