"""A server with a calibration: calibrated confidences on /v1/analyze and in decisions, and what is not told."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import openai
import pytest

from qvl.analysis.product import ProductAnalysis
from qvl.calibration import Calibration
from qvl.calibration.calibration_file import FieldCalibration, LocationsCalibration
from qvl.decisions.questions import Predicate
from qvl.evidence.prompts import LOCATE_VERSION
from qvl.pipeline.analyze_call import version_of
from qvl.types import ChatRequest, Chunk
from tests.calibration.made import HALVED, calibration_for, halved
from tests.evaluation.shelf import PLACE, Reader
from tests.media.papers import BAG, MUG, paper
from tests.server.conftest import Running, data_url, start

NEW = {"type": "predicate", "name": "new", "instructions": "Is it new?"}
OTHER = {"type": "predicate", "name": "other", "instructions": "Is it old?"}
SURE, UNSURE = data_url("red", (960, 40)), data_url("red", (640, 40))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = start(Reader(), calibration=calibration_for(Reader().identity(), Predicate("Is it new?")))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def careful() -> Iterator[Running]:
    made = calibration_for(Reader().identity(), Predicate("Is it new?", "new"))
    found = start(Reader(), calibration=made, abstain=0.8)
    yield found
    found.stop()


def decisions(picture: str, *questions: dict[str, Any]) -> dict[str, Any]:
    shown = {"role": "user", "content": [{"type": "input_image", "image_url": picture, "detail": "auto"}]}
    return {"model": "reader-1", "input": [shown], "questions": list(questions)}


def test_an_analysis_has_calibrated_confidences_and_the_raw_ones_beside_them(running: Running) -> None:
    told = running.post("/v1/analyze", {"image": UNSURE}).json()
    assert told["confidence_method"] == "calibrated"
    assert told["raw_field_confidence"]["brand"] == pytest.approx(0.64)
    assert told["field_confidence"]["brand"] == pytest.approx(halved(0.64))
    assert told["analysis"]["brand"] == "NORVIK"
    assert told["abstained"] == {}


def test_with_evidence_that_the_calibration_is_not_of_confidences_are_the_raw_ones(running: Running) -> None:
    told = running.post("/v1/analyze", {"image": UNSURE, "evidence": True}).json()
    assert told["confidence_method"] == "token_probability_product"
    assert told["field_confidence"]["brand"] == pytest.approx(0.64)


def test_a_document_of_several_pages_has_raw_confidences_too_unless_something_must_not_be_told(
    running: Running, careful: Running
) -> None:
    document = f"data:application/pdf;base64,{base64.b64encode(paper([MUG, BAG])).decode()}"
    told = running.post("/v1/analyze", {"image": document}).json()
    assert (told["analysis"]["brand"], told["confidence_method"]) == ("NORVIK", "token_probability_product")
    for server, body in ((running, {"image": document, "abstain": 0.5}), (careful, {"image": document})):
        answer = server.post("/v1/analyze", body)
        assert answer.status_code == 400
        assert "this is a document of several pages" in answer.json()["error"]["message"]


class Placer(Reader):
    """Tells where the brand is, in the form that is asked for."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        place = json.loads(PLACE)
        located = {"answer": [{"bbox_2d": place, "label": "the brand"}]}
        analysed = {"brand": "NORVIK", "category": "mug", "attributes": {}}
        seen = {"evidence": {"brand": place, "category": None, "attributes": None}}
        form = request.response_format
        placed = "evidence" in (form.schema or {}).get("properties", {})
        answer = located if form.name == "located" else analysed | (seen if placed else {})
        self.answer = lambda _: answer
        async for chunk in super().stream(request):
            yield chunk


@pytest.fixture(scope="module")
def boxes() -> Iterator[Running]:
    backend = Placer(model="qwen3-vl-reader")
    curve = FieldCalibration(curve=HALVED, labels=100, right=60)
    plain = calibration_for(backend.identity()).analysis
    assert plain is not None
    made = Calibration(
        backend=backend.identity(),
        analysis=plain.model_copy(
            update={"prompt_version": version_of(ProductAnalysis, backend, evidence=True), "evidence": {"brand": curve}}
        ),
        locations=LocationsCalibration(
            prompt_version=f"locate-{LOCATE_VERSION}-{backend.coordinates.convention}", targets={"the brand": curve}
        ),
    )
    found = start(backend, calibration=made)
    yield found
    found.stop()


def test_boxes_have_calibrated_confidences_too(boxes: Running) -> None:
    (located,) = boxes.post("/v1/locate", {"image": UNSURE, "targets": ["the brand"]}).json()["located"]
    assert located["raw_confidence"] == pytest.approx(0.64**3)
    assert located["confidence"] == pytest.approx(halved(0.64**3))
    assert located["confidence_method"] == "calibrated"
    told = boxes.post("/v1/analyze", {"image": UNSURE, "evidence": True}).json()
    assert told["confidence_method"] == "calibrated"
    assert told["evidence"]["brand"]["confidence"] == pytest.approx(halved(0.64**3))
    body = {"image": UNSURE, "evidence": True, "abstain": {"evidence.brand": 0.9}}
    silent = boxes.post("/v1/analyze", body).json()
    assert silent["evidence"]["brand"] is None
    assert silent["abstained"] == {"evidence.brand": "below_threshold"}
    plain = boxes.post("/v1/analyze", {"image": UNSURE}).json()
    assert plain["confidence_method"] == "token_probability_product"


@pytest.mark.parametrize("abstain", [0.6, {"brand": 0.6}])
def test_what_is_less_sure_than_a_request_asks_is_null_with_its_reason(running: Running, abstain: object) -> None:
    told = running.post("/v1/analyze", {"image": UNSURE, "abstain": abstain}).json()
    assert told["analysis"] == {"brand": None, "category": "mug", "attributes": {}}
    assert told["abstained"] == {"brand": "below_threshold"}
    assert running.post("/v1/analyze", {"image": SURE, "abstain": abstain}).json()["analysis"]["brand"] == "NORVIK"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"abstain": 1.5}, "abstain"),
        ({"abstain": "much"}, "abstain"),
        ({"abstain": {"brnad": 0.9}}, "no field or question 'brnad'"),
        ({"abstain": 0.9, "language": "zh"}, "another language: made with en, used with zh"),
        ({"abstain": 0.9, "schema": {"type": "object", "title": "Bill", "properties": {"a": {}}}}, "another schema"),
    ],
)
def test_what_cannot_abstain_is_refused(running: Running, body: dict[str, Any], said: str) -> None:
    answer = running.post("/v1/analyze", {"image": SURE, **body})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"] + str(answer.json()["error"]["param"])


def test_a_schema_of_the_clients_own_has_raw_confidences_that_say_so(running: Running) -> None:
    schema = {"type": "object", "properties": {"brand": {"type": "string"}}}
    told = running.post("/v1/analyze", {"image": SURE, "schema": schema}).json()
    assert told["confidence_method"] == "token_probability_product"
    assert "raw_confidence" not in told


def test_abstaining_without_a_calibration_is_refused(server: Running) -> None:
    answer = server.post("/v1/analyze", {"image": data_url(), "abstain": 0.9})
    assert answer.status_code == 400
    assert "abstain needs a calibration" in answer.json()["error"]["message"]


def test_decisions_have_calibrated_confidences(running: Running) -> None:
    new, other = running.post("/v1/decisions", decisions(UNSURE, NEW, OTHER)).json()["answers"]
    assert new["probability"] == pytest.approx(0.64)
    assert (new["raw_confidence"], new["confidence_method"]) == (pytest.approx(0.64), "calibrated")
    assert new["confidence"] == pytest.approx(halved(0.64))
    assert other.keys() == {"type", "name", "probability", "label_mass", "method"}


def test_a_decision_that_is_too_unsure_is_a_refusal_with_its_reason(careful: Running) -> None:
    answer = careful.post("/v1/decisions", decisions(UNSURE, NEW)).json()["answers"][0]
    assert (answer["type"], answer["name"], answer["reason"]) == ("refusal", "new", "below_threshold")
    assert answer["confidence"] == pytest.approx(halved(0.64))
    client = openai.OpenAI(base_url=f"{careful.url}/v1", api_key="none", max_retries=0)
    told = client.decisions.create(**decisions(UNSURE, NEW))
    assert told.answers[0].type == "refusal"
    assert client.decisions.create(**decisions(SURE, NEW)).answers[0].type == "predicate"


def test_a_question_without_a_calibration_cannot_abstain(careful: Running) -> None:
    answer = careful.post("/v1/decisions", decisions(SURE, OTHER))
    assert answer.status_code == 400
    assert "no calibration of the question 'other'" in answer.json()["error"]["message"]


def test_systemone_leaves_out_what_is_too_unsure(careful: Running) -> None:
    body = {"state": "A mug.", "questions": {"n": {"type": "noul", "instructions": "Is it new?"}}}
    answer = careful.post("/v1/systemone", body).json()["answers"]["n"]
    assert (answer["type"], answer["x_reason"]) == ("refusal", "below_threshold")
    assert answer["x_confidence"] == pytest.approx(halved(0.64))
