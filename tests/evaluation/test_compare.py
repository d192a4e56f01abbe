"""Comparison: exact, as text, as numbers and as boxes, part by part."""

from __future__ import annotations

import pytest

from qvl.errors import ConfigError
from qvl.evaluation.compare import compare, overlap, read_rules
from qvl.evidence.shapes import Box


def parts(label: object, answer: object, *rules: str) -> dict[str, bool | None]:
    """Path to right, wrong, or None for what the answer does not have."""
    return {
        part.path: part.right if part.answered or part.right else None
        for part in compare(label, answer, read_rules(rules))
    }


@pytest.mark.parametrize(
    ("label", "value", "rule", "right"),
    [
        ("NORVIK", "norvik ", None, True),
        ("São  Paulo", "são paulo", None, True),
        ("ＡＢＣ", "abc", None, True),
        ("NORVIK", "NORVIC", None, False),
        ("NORVIK", "norvik", "x=exact", False),
        ("2", 2, None, True),
        (2, "2", None, True),
        (2, 2.0, None, True),
        (12.5, 12.4, None, False),
        (12.5, 12.4, "x=number:0.1", True),
        (12.5, 12.39, "x=number:0.1", False),
        (200, 203, "x=number:2%", True),
        (200, 205, "x=number:2%", False),
        (2, "two", None, False),
        (2, "nan", None, False),
        (True, True, None, True),
        (True, 1, None, False),
        (True, "true", None, False),
        (None, None, None, True),
        (None, "NORVIK", None, False),
        ("NORVIK", None, None, False),
        ("None", None, None, False),
        ([1, 2], [1, 2], "x=exact", True),
        ([1, 2], [2, 1], "x=exact", False),
    ],
)
def test_a_value_is_compared_by_its_rule(label: object, value: object, rule: str | None, right: bool) -> None:
    assert parts({"x": label}, {"x": value}, *([rule] if rule else [])) == {"x": right}


def test_every_part_is_compared_for_itself_and_what_is_not_labelled_is_not() -> None:
    label = {"brand": "A", "items": [{"price": 1}, {"price": 2}], "attributes": {"color": "red"}}
    answer = {"brand": "A", "category": "mug", "items": [{"price": 1}, {"price": 3}], "attributes": {"size": "big"}}
    assert parts(label, answer) == {
        "brand": True,
        "items.0.price": True,
        "items.1.price": False,
        "attributes.color": None,
    }


def test_lists_of_other_lengths_and_entries_of_an_empty_mapping_are_wrong() -> None:
    assert parts({"a": [1, 2]}, {"a": [1]}) == {"a.0": True, "a.1": None}
    assert parts({"a": [1]}, {"a": [1, 2, 3]}) == {"a.0": True, "a.1": False, "a.2": False}
    assert parts({"a": []}, {"a": [5]}) == {"a.0": False}
    assert parts({"a": {}}, {"a": {"color": "red"}}) == {"a.color": False}
    assert parts({"a": {}}, {"a": {}}) == {"a": True}


def test_names_with_dots_are_found() -> None:
    assert parts({"a": {"b.c": 1}}, {"a": {"b.c": 1}}) == {"a.b.c": True}


def test_boxes_are_compared_by_their_overlap() -> None:
    label = {"x1": 0, "y1": 0, "x2": 100, "y2": 100}
    near, far = {**label, "x2": 60}, {**label, "x2": 40}
    assert parts({"where": label}, {"where": near}) == {"where": True}
    assert parts({"where": label}, {"where": far}) == {"where": False}
    assert parts({"where": label}, {"where": near}, "where=iou:0.9") == {"where": False}
    assert parts({"where": label}, {"where": None}) == {"where": False}
    assert parts({"where": [0, 0, 100, 100]}, {"where": near}, "where=iou:0.5") == {"where": True}


def test_the_overlap_is_that_of_boxes() -> None:
    one, two = Box(10, 20, 110, 90, 200, 100), Box(30, 10, 150, 80, 200, 100)
    assert overlap(one.to_json(), two.to_json()) == pytest.approx(one.iou(two))
    assert overlap(one.to_json(), "no box") is None


@pytest.mark.parametrize(
    "text",
    ["x", "x=", "=text", "x=fuzzy", "x=text:1", "x=number:much", "x=number:nan", "x=number:-1", "x=iou:0", "x=iou:1.5"],
)
def test_a_rule_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--compare") as caught:
        read_rules([text])
    assert "FIELD=number:0.01" in str(caught.value.hint)
