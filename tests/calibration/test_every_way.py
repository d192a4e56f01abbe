"""What is too unsure is not told, whatever way an answer takes: documents, boxes, answers without a probability."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel

from qvl import AsyncPipeline, Box, MediaPolicy, Pipeline
from qvl.analysis.parse_answer import generation_schema
from qvl.analysis.product import ProductAnalysis
from qvl.backends.base import Backend
from qvl.calibration import Calibration
from qvl.calibration.calibration_file import AnalysisCalibration, FieldCalibration, LocationsCalibration
from qvl.decisions import Predicate
from qvl.errors import ConfigError, RequestError
from qvl.evaluation.collect import Collector
from qvl.evaluation.labelled import read_labelled
from qvl.evidence.prompts import LOCATE_VERSION
from qvl.pipeline.analyze_call import version_of
from qvl.types import ChatRequest, Chunk, JsonObject, Usage
from tests.calibration.made import HALVED, calibration_for, halved
from tests.evaluation.shelf import PLACE, Reader
from tests.media.papers import BAG, MUG, SHOE, paper

CURVE = FieldCalibration(curve=HALVED, labels=100, right=60)
UNSURE = Image.new("RGB", (640, 40), "red")
LOOSE = MediaPolicy(document_dpi=72)
TIGHT = MediaPolicy(document_dpi=72, max_document_pixels=2 * 320 * 240)


def analyses(schema: type[BaseModel], backend: Backend, *fields: str, evidence: tuple[str, ...] = ()) -> Calibration:
    made = AnalysisCalibration(
        prompt_version=version_of(schema, backend, evidence=bool(evidence)),
        language="en",
        schema=generation_schema(schema),
        raw_method="token_probability_product",
        fields=dict.fromkeys(fields, CURVE),
        evidence=dict.fromkeys(evidence, CURVE),
    )
    return Calibration(backend=backend.identity(), analysis=made)


@pytest.mark.parametrize(
    ("media", "abstain", "error", "said"),
    [
        (TIGHT, 0.9, RequestError, "more pages than one request takes, and abstain is for one request"),
        (TIGHT, None, RequestError, "more pages than one request takes, and the calibration is of one request"),
        (LOOSE, 0.9, ConfigError, "the calibration is of single pictures, and this is a document of several pages"),
        (LOOSE, None, ConfigError, "the calibration is of single pictures, and this is a document of several pages"),
    ],
)
def test_a_document_is_refused_where_the_calibration_is_of_pictures(
    media: MediaPolicy, abstain: float | None, error: type[Exception], said: str
) -> None:
    backend = Reader()
    made = calibration_for(backend.identity())
    with Pipeline(backend=backend, cache="off", calibration=made, abstain=abstain, media=media) as pipe:
        with pytest.raises(error, match=said):
            pipe.analyze(paper([MUG, BAG, SHOE]))
        assert backend.asked == 0
        told = pipe.analyze(paper([MUG, BAG, SHOE]), calibrated=False)
        assert (told.brand, told.confidence_method) == ("NORVIK", "token_probability_product")
        one = pipe.analyze(paper([MUG]))
        assert (one.brand, one.confidence_method) == (None if abstain else "NORVIK", "calibrated")


@pytest.mark.asyncio
async def test_documents_and_pictures_make_no_calibration_together(tmp_path: Path) -> None:
    UNSURE.save(tmp_path / "a.png")
    (tmp_path / "b.pdf").write_bytes(paper([MUG, BAG]))
    expected = {"brand": "NORVIK", "category": "mug", "attributes": {}}
    lines = [json.dumps({"image": name, "expected": expected}) for name in ("a.png", "b.pdf")]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    async with AsyncPipeline(backend=Reader(), cache="off", media=LOOSE) as pipe:
        collector = Collector(pipe, read_labelled([str(tmp_path / "labels.jsonl")]))
        with pytest.raises(ConfigError, match="a document of several pages among single pictures"):
            await collector.collect()


class Part(BaseModel):
    brand: str | None
    where: Box | None


def test_a_box_that_is_a_field_has_the_calibrated_confidence_and_says_so() -> None:
    backend = Reader(model="qwen3-vl-r", answer=lambda _: {"brand": "NORVIK", "where": json.loads(PLACE)})
    made = analyses(Part, backend, "brand", "where")
    with Pipeline(backend=backend, cache="off", calibration=made) as pipe:
        (item,) = pipe.analyze_result(UNSURE, schema=Part).shapes
        (raw,) = pipe.analyze_result(UNSURE, schema=Part, calibrated=False).shapes
    assert (item.confidence_method, item.raw_confidence) == ("calibrated", pytest.approx(0.64**3))
    assert item.confidence == pytest.approx(halved(0.64**3))
    assert (raw.confidence_method, raw.raw_confidence, raw.confidence) == (None, None, pytest.approx(0.64**3))


def placed(_: float) -> JsonObject:
    brand, whole = json.loads(PLACE), [0, 0, 500, 500]
    return {
        "brand": "NORVIK",
        "category": "mug",
        "attributes": {},
        "evidence": {"brand": brand, "category": whole, "attributes": None},
    }


def test_a_box_beside_a_field_without_a_calibration_is_not_told_where_all_must_be_sure() -> None:
    backend = Reader(model="qwen3-vl-r", answer=placed)
    made = analyses(ProductAnalysis, backend, "brand", "category", evidence=("brand",))
    with Pipeline(backend=backend, cache="off", calibration=made) as pipe:
        told = pipe.analyze_result(UNSURE, evidence=True)
        silent = pipe.analyze_result(UNSURE, evidence=True, abstain=0.01)
        named = pipe.analyze_result(UNSURE, evidence=True, abstain={"evidence.brand": 0.01})
    assert told.evidence["category"] is not None
    assert silent.evidence["brand"] is not None
    assert silent.evidence["category"] is None
    assert silent.abstained == {"evidence.category": "not_calibrated"}
    assert named.evidence["category"] is not None


class Speaker(Reader):
    """Tells boxes as Qwen2-VL does, in no JSON, so that they have no probability of their own."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(text="(250,100),(500,900)")
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=5))


@pytest.mark.parametrize("abstain", [None, 0.5])
def test_a_located_box_without_a_probability_is_not_sure(abstain: float | None) -> None:
    backend = Speaker(model="qwen3-vl-r")
    version = f"locate-{LOCATE_VERSION}-0-1000"
    boxes = LocationsCalibration(prompt_version=version, targets={"the brand": CURVE})
    made = Calibration(backend=backend.identity(), locations=boxes)
    with Pipeline(backend=backend, cache="memory:", calibration=made, abstain=abstain) as pipe:
        for cache in ("miss", "hit"):
            found = pipe.locate(UNSURE, "the brand")
            assert found.result.cache == cache
            assert [item.label for item in found] == ([] if abstain else ["the brand"])
            left_out = "left out a box for 'the brand': not_calibrated"
            assert (left_out in found.result.notes) == bool(abstain)


@pytest.mark.parametrize("abstain", [None, 0.5])
def test_a_decision_without_a_probability_is_not_sure(abstain: float | None) -> None:
    asked = Predicate("Is it new?", "new")
    backend = Reader(logprobs=False)
    made = calibration_for(backend.identity(), asked)
    with Pipeline(backend=backend, cache="off", calibration=made, abstain=abstain) as pipe:
        answer = pipe.decide(UNSURE, asked)["new"]
    assert (answer.method, answer.confidence) == ("choice", None)
    assert (answer.value, answer.abstained) == ((None, "not_calibrated") if abstain else (True, None))
