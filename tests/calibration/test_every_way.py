"""What is too unsure is not told, whatever way an answer takes: documents, boxes, answers without a probability."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel

from qvl import AsyncPipeline, Box, MediaPolicy, Pipeline
from qvl.analysis.parse_answer import generation_schema
from qvl.analysis.product import ProductAnalysis
from qvl.backends.base import Backend, OwnDecisions
from qvl.calibration import Calibration
from qvl.calibration.calibration_file import AnalysisCalibration, FieldCalibration, LocationsCalibration
from qvl.decisions import Predicate
from qvl.errors import BackendResponseError, ConfigError, RequestError, UnsupportedInputError
from qvl.evaluation.calibrate import calibrate
from qvl.evaluation.collect import Collector
from qvl.evaluation.labelled import read_labelled
from qvl.evidence.prompts import LOCATE_VERSION
from qvl.pipeline.analyze_call import version_of
from qvl.server.openai_decisions_3_57 import answers_from
from qvl.types import ChatRequest, Chunk, JsonMapping, JsonObject, Usage
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


def test_a_box_without_a_calibration_is_left_out_as_a_whole_where_it_may_be_null() -> None:
    backend = Reader(model="qwen3-vl-r", answer=lambda _: {"brand": "NORVIK", "where": json.loads(PLACE)})
    made = analyses(Part, backend, "brand")
    with Pipeline(backend=backend, cache="off", calibration=made, abstain=0.01) as pipe:
        told = pipe.analyze_result(UNSURE, schema=Part)
    assert (told.value, told.shapes) == (Part(brand="NORVIK", where=None), ())
    assert told.abstained == {"where": "not_calibrated"}


class Line(BaseModel):
    text: str | None
    price: float


class Receipt(BaseModel):
    brand: str | None
    lines: list[Line]


def test_what_could_not_be_left_out_is_refused_before_it_is_asked() -> None:
    backend = Reader(answer=lambda _: {"brand": "NORVIK", "lines": [{"text": None, "price": 12.5}]})
    made = analyses(Receipt, backend, "brand")
    with Pipeline(backend=backend, cache="off", calibration=made) as pipe:
        with pytest.raises(ConfigError, match=r"abstain: the field 'lines.\*.price' of Receipt cannot be null"):
            pipe.analyze(UNSURE, schema=Receipt, abstain=0.5)
        assert backend.asked == 0
        assert pipe.analyze(UNSURE, schema=Receipt, abstain={"brand": 0.5}).lines[0].price == 12.5


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


class Broken(OwnDecisions):
    """Has decisions of its own, which fail behind the first `left` of them."""

    def __init__(self, left: int = 0) -> None:
        super().__init__()
        self.images, self.left = True, left

    async def ask(
        self, request: ChatRequest, questions: Sequence[JsonMapping]
    ) -> tuple[Sequence[Mapping[str | bool, float] | None], Usage]:
        if self.left <= 0:
            raise BackendResponseError("it is another one")
        self.left -= 1
        return [{True: 0.7, False: 0.3} for _ in questions], Usage()


@dataclass
class Failing(Reader):
    """An endpoint whose own decisions fail, so that it is asked otherwise."""

    own: OwnDecisions = field(default_factory=Broken)

    async def own_decisions(self) -> OwnDecisions:
        return self.own


def test_an_answer_by_another_method_than_was_calibrated_is_not_sure() -> None:
    asked = Predicate("Is it new?", "new")
    backend = Failing()
    made = calibration_for(backend.identity(), asked)
    assert made.decisions is not None
    (key, one), *_ = made.decisions.questions.items()
    for method, confidence, abstained in (
        ("", halved(0.64), None),
        ("top_logprobs", halved(0.64), None),
        ("decisions", 0.64, "not_calibrated"),
    ):
        only = {key: one.model_copy(update={"method": method})}
        of = made.model_copy(update={"decisions": made.decisions.model_copy(update={"questions": only})})
        with Pipeline(backend=backend, cache="off", calibration=of) as pipe:
            answer = pipe.decide(UNSURE, asked)["new"]
            careful = pipe.decide(UNSURE, asked, abstain=0.1)["new"]
        assert (answer.value, answer.method, answer.confidence) == (True, "top_logprobs", pytest.approx(confidence))
        assert answer.calibrated == (method != "decisions")
        assert careful.abstained == abstained


@pytest.mark.asyncio
async def test_a_calibration_names_the_method_and_takes_one_alone(tmp_path: Path) -> None:
    asked = Predicate("Is it new?", "new")
    (tmp_path / "labels.jsonl").write_text(
        "".join(
            json.dumps({"id": str(n), "image": f"{n}.png", "expected": {"new": n % 3 > 0}}) + "\n" for n in range(60)
        )
    )
    for number in range(60):
        Image.new("RGB", (400 + 5 * number, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    labels = read_labelled([str(tmp_path / "labels.jsonl")])
    async with AsyncPipeline(backend=Reader(), cache="off") as pipe:
        collector = Collector(pipe, labels, questions=[asked])
        made, _ = calibrate(collector, await collector.collect(), pipe.backend.identity())
    assert made.decisions is not None
    assert [one.method for one in made.decisions.questions.values()] == ["top_logprobs"]
    async with AsyncPipeline(backend=Failing(own=Broken(2)), cache="off", concurrency=1) as pipe:
        collector = Collector(pipe, labels, questions=[asked])
        with pytest.raises(ConfigError, match="'new' was answered by 'top_logprobs', before by 'decisions'"):
            await collector.collect()


class Patchy(Reader):
    """Tells no probabilities of every fifth picture, as an endpoint does whose answer has to be mended to be read."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        bare = request.pictures[0].width % 5 == 0
        async for chunk in super().stream(request):
            yield replace(chunk, logprobs=()) if bare else chunk


@pytest.mark.asyncio
async def test_an_answer_without_a_probability_costs_its_label_alone(tmp_path: Path) -> None:
    lines = []
    for number in range(20):
        Image.new("RGB", (400 + number, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
        expected = {"brand": "NORVIK", "category": "mug", "attributes": {}, "new": True}
        lines.append(json.dumps({"image": f"{number}.png", "expected": expected}) + "\n")
    (tmp_path / "labels.jsonl").write_text("".join(lines))
    labels = read_labelled([str(tmp_path / "labels.jsonl")])
    async with AsyncPipeline(backend=Patchy(), cache="off") as pipe:
        found = await Collector(pipe, labels, questions=[Predicate("Is it new?", "new")]).collect()
    assert (len(found.fields["brand"]), len(found.questions["new"]), len(found.answers)) == (16, 16, 16)
    assert (found.unanswered["brand"], found.unanswered["new"]) == (4, 4)


def test_an_answer_without_probabilities_says_why_and_not_what_failed_before() -> None:
    with Pipeline(backend=Failing(logprobs=False), cache="off") as pipe:
        told = pipe.decide(UNSURE, "Is it new?")
    with pytest.raises(UnsupportedInputError, match=r"questions\[0\]: the answer stands alone, without probabilities"):
        answers_from(told, "m")
