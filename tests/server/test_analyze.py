"""`POST /v1/analyze`."""

from __future__ import annotations

import pytest

from qvl.analysis.schema_model import model_of
from tests.server.conftest import Running, data_url, picture

SHOE = {
    "type": "object",
    "title": "Shoe",
    "properties": {
        "brand": {"type": "string"},
        "in stock": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        "kind": {"enum": ["boot", "sandal"]},
        "maker": {"$ref": "#/$defs/Maker"},
        "note": {"type": ["string", "null"]},
    },
    "required": ["brand", "in stock", "sizes", "kind", "maker"],
    "additionalProperties": False,
    "$defs": {"Maker": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}


def test_a_product_has_fields_confidences_and_a_second_time_from_the_cache(server: Running) -> None:
    body = {"image": data_url("red", (96, 64)), "language": "zh"}
    first = server.post("/v1/analyze", body)
    assert first.status_code == 200, first.text
    found = first.json()
    assert set(found["analysis"]) == {"brand", "category", "attributes"}
    assert found["language"] == "zh"
    assert 0 < found["confidence"] <= 1
    assert 0 < found["field_confidence"]["brand"] <= 1
    assert first.headers["x-qvl-cache"] == "miss"
    again = server.post("/v1/analyze", body)
    assert again.headers["x-qvl-cache"] == "hit"
    assert again.json()["analysis"] == found["analysis"]
    assert again.json()["field_confidence"] == found["field_confidence"]
    assert server.post("/v1/analyze", {**body, "language": "en"}).headers["x-qvl-cache"] == "miss"


def test_a_picture_may_be_the_body(server: Running) -> None:
    with server.client() as client:
        answer = client.post("/v1/analyze?language=pt", content=picture("blue"), headers={"Content-Type": "Image/PNG"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["language"] == "pt"


def test_a_schema_of_ones_own(server: Running) -> None:
    body = {"images": [data_url("red"), data_url("blue")], "schema": SHOE}
    first, again = server.post("/v1/analyze", body), server.post("/v1/analyze", body)
    assert first.status_code == 200, first.text
    found = first.json()["analysis"]
    assert found == {"brand": "x", "in stock": True, "sizes": [0], "kind": "boot", "maker": {"city": "x"}}
    assert again.json()["analysis"] == found
    assert again.headers["x-qvl-cache"] == "hit"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "image"),
        ({"image": "x", "images": ["y"]}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": data_url(), "language": "xx"}, "language"),
        ({"image": data_url(), "schema": {"type": "array"}}, "schema"),
        ({"image": data_url(), "schema": {"type": "object", "properties": {"a": {"type": "wat"}}}}, "schema"),
        ({"image": data_url(), "schema": {"type": "object", "properties": {"a": {"$ref": "#/b"}}}}, "schema"),
        ({"image": data_url(), "schema": {"type": "object", "properties": {"a": {"minLength": "x"}}}}, "schema"),
        ({"image": data_url(), "schema": {"type": "object", "properties": {"a": {"pattern": "^(?!x)"}}}}, "schema"),
        ({"image": data_url(), "schema": {"type": "object", "properties": {"a": {"pattern": "("}}}}, "schema"),
        ({"image": data_url(), "frobnicate": 1}, "frobnicate"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_by_name(server: Running, body: dict, param: str | None) -> None:
    answer = server.post("/v1/analyze", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_schema_model_refuses_what_the_schema_refuses() -> None:
    model = model_of(SHOE)
    good = {"brand": "a", "in stock": True, "sizes": [1], "kind": "boot", "maker": {"city": "b"}}
    assert model.model_validate(good).model_dump() == good
    assert model.model_json_schema() == SHOE
    for name, value in (("kind", "hat"), ("sizes", []), ("maker", {}), ("more", 1), ("brand", None)):
        with pytest.raises(ValueError, match=name if name != "maker" else "city"):
            model.model_validate({**good, name: value})
