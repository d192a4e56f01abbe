"""Boxes in schemas, and `evidence=True`: each field with the box that it was read from, in the same answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from qvl import Box, Located, Pipeline, Point, ProductAnalysis
from qvl.errors import AnalysisError, ConfigError
from qvl.testing.asking import square
from qvl.types import ChatRequest
from tests.pipeline.conftest import TalkingBackend

WHERE = Box(16, 8, 32, 24, 64, 64)
RAW = [250, 125, 500, 375]
PRODUCT = {"brand": "NORVIK", "category": None, "attributes": {"color": "red"}}
EVIDENCE = {"brand": RAW, "category": None, "attributes": RAW}


class Part(BaseModel):
    name: str
    where: Box


@dataclasses.dataclass
class Tip:
    at: Point
    of: Annotated[Box | None, Field(description="the handle")] = None


class Parts(BaseModel):
    parts: list[Part]
    tip: Tip | None = None
    marks: dict[str, Box | str] = Field(default_factory=dict)
    numbers: list[int] = Field(default_factory=list)


JSON_SCHEMA = {
    "type": "object",
    "properties": {"where": {"$ref": "#/$defs/place"}, "many": {"type": "array", "items": {"format": "point"}}},
    "required": ["where"],
    "$defs": {"place": {"format": "box", "description": "the lid"}},
}


def talking(*answers: object, **options: Any) -> TalkingBackend:
    texts = iter([answer if isinstance(answer, str) else json.dumps(answer) for answer in answers])
    return TalkingBackend(options.pop("model", "Qwen3-VL-8B"), reply=lambda request: next(texts), **options)


def asked(backend: TalkingBackend) -> ChatRequest:
    return backend.requests[-1]


def test_a_product_tells_where_each_field_is_in_one_request() -> None:
    backend = talking({**PRODUCT, "evidence": EVIDENCE}, PRODUCT)
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first = pipe.analyze_result(square(), evidence=True)
        again = pipe.analyze_result(square(), evidence=True)
        plain = pipe.analyze_result(square())
    assert len(backend.requests) == 2
    assert (first.result.cache, again.result.cache) == ("miss", "hit")
    for result in (first, again):
        brand = result.evidence["brand"]
        assert brand is not None
        assert brand.box == WHERE
        assert brand.confidence is not None
        assert 0 < brand.confidence < 1
        assert result.evidence["category"] is None
        assert result.value.evidence == result.evidence
        assert ProductAnalysis.model_validate_json(result.value.model_dump_json()) == result.value
    # The fields are what they are without evidence, confidences and dump included.
    assert first.field_confidence == plain.field_confidence
    assert first.confidence == plain.confidence
    assert "evidence" not in plain.value.model_dump()
    schema = backend.requests[0].response_format.schema
    assert schema is not None
    assert list(schema["properties"]) == ["brand", "category", "attributes", "evidence"]
    text = backend.requests[0].messages[-1].text
    assert text.startswith(backend.requests[1].messages[-1].text + " At the end, evidence: ")


def test_shapes_are_fields_of_any_schema() -> None:
    answer = {
        "parts": [{"name": "lid", "where": RAW}, {"name": "cup", "where": {"bbox_2d": "0, 0, 2000, 500"}}],
        "tip": {"at": [500, 250], "of": RAW},
        "marks": {"a": RAW, "b": "hidden"},
        "numbers": RAW,
    }
    backend = talking(answer, answer)
    with Pipeline(backend=backend, cache="memory:") as pipe:
        result, again = (pipe.analyze_result(square(), schema=Parts) for _ in range(2))
    assert result.value == again.value
    assert result.value == Parts(
        parts=[Part(name="lid", where=WHERE), Part(name="cup", where=Box(0, 0, 64, 32, 64, 64, clipped=True))],
        tip=Tip(Point(32, 16, 64, 64), WHERE),
        marks={"a": WHERE, "b": "hidden"},
        numbers=RAW,
    )
    assert [item.label for item in result.shapes] == ["parts.0.where", "parts.1.where", "tip.at", "tip.of", "marks.a"]
    assert result.shapes == again.shapes
    # Four numbers are one value.
    assert result.shapes[0].confidence == result.field_confidence["parts.0.where"]
    assert "parts.0.where.0" not in result.field_confidence
    assert result.result.notes == ("cut at the picture's edges: {'bbox_2d': '0, 0, 2000, 500'} for 'parts.1.where'",)
    text = asked(backend).messages[-1].text
    assert '"description": "box [x1, y1, x2, y2] on the picture, coordinates from 0 to 1000"' in text
    assert '"description": "the handle"' in text
    assert '"maximum": 1000' in text


def test_a_json_schema_names_shapes_by_their_format() -> None:
    backend = talking({"where": RAW, "many": [[500, 250], [0, 0]]})
    with Pipeline(backend=backend, cache="off") as pipe:
        result = pipe.analyze_result(square(), schema=JSON_SCHEMA)
    assert result.value["where"] == WHERE.to_json()
    assert result.value["many"] == [Point(32, 16, 64, 64).to_json(), Point(0, 0, 64, 64).to_json()]
    assert [item.label for item in result.shapes] == ["where", "many.0", "many.1"]


def test_a_box_alone_or_a_list_of_them_is_a_schema() -> None:
    backend = talking({"answer": RAW}, {"answer": [RAW, RAW]})
    with Pipeline(backend=backend, cache="off") as pipe:
        assert pipe.analyze(square(), schema=Box) == WHERE
        several = pipe.analyze_result(square(), schema=list[Box])
    assert several.value == [WHERE, WHERE]
    assert [item.label for item in several.shapes] == ["0", "1"]


def test_of_a_box_or_a_point_the_numbers_tell_which() -> None:
    class Either(BaseModel):
        at: Box | Point | str

    backend = talking({"at": RAW}, {"at": [500, 250]}, {"at": "behind it"})
    with Pipeline(backend=backend, cache="off") as pipe:
        found = [pipe.analyze(square(), schema=Either).at for _ in range(3)]
    assert found == [WHERE, Point(32, 16, 64, 64), "behind it"]


def test_a_box_that_a_schema_needs_is_asked_for_again() -> None:
    outside, right = {"name": "lid", "where": [1500, 0, 1600, 9]}, {"name": "lid", "where": RAW}
    backend = talking(outside, right, outside, outside)
    with Pipeline(backend=backend, cache="off") as pipe:
        assert pipe.analyze(square(), schema=Part) == Part(name="lid", where=WHERE)
        assert "[1500, 0, 1600, 9] for 'where': it is outside of the picture" in asked(backend).messages[-1].text
        with pytest.raises(AnalysisError, match="for 'where': it is outside of the picture"):
            pipe.analyze(square(), schema=Part)


def test_a_box_that_a_schema_does_not_need_is_left_out_and_told() -> None:
    class Lid(BaseModel):
        where: Box
        hole: Box | None

    told = ([1500, 0, 1600, 9], [], "hidden", [float("nan"), 1, 2, 3], [5, 5], RAW, None)
    backend = talking(*[{"where": RAW, "hole": hole} for hole in told])
    with Pipeline(backend=backend, cache="off") as pipe:
        found = [pipe.analyze_result(square(), schema=Lid) for _ in told]
    assert [one.value.hole for one in found] == [None, None, None, None, None, WHERE, None]
    assert [one.value.where for one in found] == [WHERE] * len(told)
    assert [note for one in found for note in one.result.notes] == [
        "left out [1500, 0, 1600, 9] for 'hole': it is outside of the picture",
        "left out [] for 'hole': not a box",
        "left out hidden for 'hole': not a box",
        "left out [nan, 1, 2, 3] for 'hole': not a number",
        "left out [5, 5] for 'hole': not a box",
    ]


@pytest.mark.parametrize(
    "hole",
    [
        {"type": ["array", "null"], "format": "box"},
        {"anyOf": [{"$ref": "#/$defs/box"}, {"type": "null"}]},
        {"$ref": "#/$defs/none"},
        {"anyOf": [{"allOf": [{"$ref": "#/$defs/box"}]}, {"type": "null"}]},
        {"oneOf": [{"type": "null"}, {"anyOf": [{"$ref": "#/$defs/point"}, {"$ref": "#/$defs/box"}]}]},
    ],
)
def test_a_json_schema_may_say_in_many_ways_that_a_box_may_be_null(hole: dict[str, Any]) -> None:
    defs = {"box": {"type": "array", "format": "box"}, "point": {"type": "array", "format": "point"}}
    defs["none"] = {"anyOf": [{"$ref": "#/$defs/box"}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"hole": hole}, "required": ["hole"], "$defs": defs}
    told = ([1500, 0, 1600, 9], "hidden", RAW, None)
    backend = talking(*[{"hole": value} for value in told])
    with Pipeline(backend=backend, cache="off") as pipe:
        found = [pipe.analyze_result(square(), schema=schema) for _ in told]
    assert [one.value["hole"] for one in found] == [None, None, WHERE.to_json(), None]
    assert [bool(one.result.notes) for one in found] == [True, True, False, False]


def test_evidence_that_is_none_is_left_out_and_told() -> None:
    wrong = {"brand": [1500, 0, 1600, 9], "category": "left", "attributes": [5, 5, 5, 9]}
    backend = talking({**PRODUCT, "evidence": wrong}, PRODUCT, formats=frozenset())
    with Pipeline(backend=backend, cache="off") as pipe:
        result = pipe.analyze_result(square(), evidence=True)
        none = pipe.analyze_result(square(), evidence=True)
    assert result.evidence == {"brand": None, "category": None, "attributes": None}
    assert result.result.notes[1:] == (
        "left out [1500, 0, 1600, 9] for 'evidence.brand': it is outside of the picture",
        "left out left for 'evidence.category': not a box",
        "left out [5, 5, 5, 9] for 'evidence.attributes': it has no area",
    )
    assert none.value.brand == "NORVIK"
    assert none.result.notes[1:] == ("the answer has no evidence",)
    # A backend that enforces no schema is told it.
    assert '"evidence"' in asked(backend).messages[-1].text


def test_with_several_pictures_each_box_says_on_which_it_is() -> None:
    second = {"picture": 2, "bbox_2d": RAW}
    backend = talking({"name": "lid", "where": second, "evidence": {"name": second, "where": RAW}})
    with Pipeline(backend=backend, cache="off") as pipe:
        result = pipe.analyze_result([square(), square()], schema=Part, evidence=True)
    assert result.value.where == dataclasses.replace(WHERE, picture=1)
    name = result.evidence["name"]
    assert name == Located("name", dataclasses.replace(WHERE, picture=1), confidence=name and name.confidence)
    assert result.result.notes == (
        "left out [250, 125, 500, 375] for 'evidence.where': it does not say on which picture",
    )
    assert '"picture": {"type": "integer", "minimum": 1, "maximum": 2}' in asked(backend).messages[-1].text


def test_a_picture_may_be_numbered_in_text_and_of_several_places_of_one_field_the_first_is_taken_and_told() -> None:
    second = {"picture": "2", "bbox_2d": RAW}
    backend = talking({"name": "lid", "where": second}, {"name": "lid", "where": [RAW, [0, 0, 9, 9]]})
    with Pipeline(backend=backend, cache="off") as pipe:
        of_two = pipe.analyze_result([square(), square()], schema=Part)
        of_one = pipe.analyze_result(square(), schema=Part)
    assert (of_two.value.where, of_two.result.notes) == (dataclasses.replace(WHERE, picture=1), ())
    assert of_one.value.where == WHERE
    assert of_one.result.notes == ("the first of 2 is taken: [[250, 125, 500, 375], [0, 0, 9, 9]] for 'where'",)


def test_a_model_that_writes_pixels_is_asked_for_them() -> None:
    backend = talking({"name": "lid", "where": [14, 0, 28, 56]}, model="Qwen2.5-VL-7B")
    with Pipeline(backend=backend, cache="off") as pipe:
        # 64 pixels are resized to 56 for it.
        assert pipe.analyze(square(), schema=Part).where == Box(16, 0, 32, 64, 64, 64)
    assert "coordinates in pixels" in asked(backend).messages[-1].text
    assert '"maximum": 56' in asked(backend).messages[-1].text


@pytest.mark.parametrize(
    ("schema", "evidence", "message"),
    [
        ({"type": "object", "properties": {"evidence": {"type": "string"}}}, True, "a field 'evidence' of its own"),
        (dict[str, str], True, "needs a schema with named fields"),
        (None, "yes", "neither True nor False"),
    ],
)
def test_evidence_that_cannot_be_asked_for_is_refused(schema: Any, evidence: Any, message: str) -> None:
    with Pipeline(backend=talking(), cache="off") as pipe, pytest.raises(ConfigError, match=message):
        pipe.analyze(square(), schema=schema, evidence=evidence)


def test_map_brings_evidence_with_each_picture() -> None:
    backend = talking({**PRODUCT, "evidence": EVIDENCE})
    with Pipeline(backend=backend, cache="off") as pipe:
        (item,) = pipe.map([square()], evidence=True)
    assert item.value is not None
    assert item.value.evidence is not None
    assert item.value.evidence["brand"] is not None
