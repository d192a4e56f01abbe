"""Abstention: which thresholds there are, and how a schema allows a field to be without a value."""

from __future__ import annotations

import math

import pytest

from qvl.analysis.product import ProductFields
from qvl.calibration.abstain import Thresholds, has_field, how_emptied, read_abstain, without
from qvl.errors import ConfigError
from qvl.evaluation.compare import compare

BILL = {
    "type": "object",
    "properties": {
        "seller": {"type": "string"},
        "total": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "paid": {"type": ["boolean", "null"]},
        "kind": {"enum": ["a", None]},
        "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}},
        "notes": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {},
    },
    "$defs": {
        "Item": {"type": "object", "properties": {"price": {"type": ["number", "null"]}, "name": {"type": "string"}}},
        "Loop": {"$ref": "#/$defs/Loop"},
    },
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("seller", None),
        ("total", "null"),
        ("paid", "null"),
        ("kind", "null"),
        ("items.*.price", "null"),
        ("items.*.name", None),
        ("notes.size", "left out"),
        ("free", "null"),
        ("unknown", None),
    ],
)
def test_a_field_becomes_null_or_is_left_out_as_the_schema_allows(name: str, how: str | None) -> None:
    assert how_emptied(BILL, name) == how


def test_fields_are_known_through_references_and_free_mappings() -> None:
    schema = ProductFields.model_json_schema()
    assert all(has_field(schema, name) for name in ("brand", "attributes", "attributes.color"))
    assert not has_field(schema, "price")
    assert has_field(BILL, "items.*.price")
    assert not has_field(BILL, "items.*.weight")
    assert not has_field({"properties": {"a": {"$ref": "#/$defs/Loop"}}, **BILL}, "a.b")


def test_an_answer_is_emptied_without_a_change_to_the_original() -> None:
    data = {"a": 1, "items": [{"price": 2}, {"price": 3}], "notes": {"x.y": "z", "w": "v"}}
    emptied = without(data, {"items.1.price": "null", "notes.x.y": "left out", "a": "null"})
    assert emptied == {"a": None, "items": [{"price": 2}, {"price": None}], "notes": {"w": "v"}}
    assert data["items"][1] == {"price": 3}  # type: ignore[index]


def test_a_key_with_a_dot_beside_the_shorter_one_is_the_one_that_is_meant() -> None:
    data = {"attributes": {"size": "L", "size.eu": "42"}}
    assert without(data, {"attributes.size.eu": "left out"}) == {"attributes": {"size": "L"}}
    assert [(part.path, part.right) for part in compare(data, data, {})] == [
        ("attributes.size", True),
        ("attributes.size.eu", True),
    ]


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, True, "0.9", {"brand": "much"}, {"brand": math.nan}])
def test_what_is_no_confidence_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="is not a confidence"):
        read_abstain(value)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no field or question 'brnad'") as caught:
        read_abstain({"brnad": 0.9}, ["brand", "category"])
    assert "brand" in str(caught.value.hint)


def test_named_thresholds_come_before_that_of_all() -> None:
    both = Thresholds(0.5, {"brand": 0.9})
    assert (both.of("brand"), both.of("category")) == (0.9, 0.5)
    assert both.reason("brand", 0.8) == "below_threshold"
    assert both.reason("category", 0.8) is None
    assert both.reason("category", None) == "not_calibrated"
    assert read_abstain({"brand": 0.9}).reason("category", None) is None  # type: ignore[union-attr]
