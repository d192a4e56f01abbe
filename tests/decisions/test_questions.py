"""Questions check themselves, and each fault is one clear line."""

from __future__ import annotations

import math

import pytest

from qvl.decisions import Choice, Level, Option, Predicate, Score
from qvl.decisions.questions import MAX_ORDERS, Question, QuestionLike, orders, read_questions
from qvl.errors import RequestError
from qvl.evidence.shapes import Box, Point

RED = {"type": "choice", "instructions": "Colour?", "choices": [{"value": "red"}, {"value": "blue"}]}


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({**RED, "choices": [{"value": "red"}, {"value": "red"}]}, "'red' stands twice"),
        ({**RED, "choices": [{"value": "red"}, {"value": " red"}]}, "'red' stands twice"),
        ({**RED, "choices": [{"value": "red"}]}, "1 choice (2 to 255 of them)"),
        ({**RED, "choices": [{"value": str(n)} for n in range(256)]}, "256 choices (2 to 255 of them)"),
        ({**RED, "choices": [{"value": "red"}, {"value": math.nan}]}, "a choice is NaN"),
        ({**RED, "choices": [{"value": "red"}, {"value": 7}]}, "a choice is int 7"),
        ({**RED, "choices": [{"value": "red"}, {"value": " "}]}, "a choice is empty"),
        ({**RED, "choices": [{"value": "red"}, {"values": "blue"}]}, "unknown field 'values'"),
        ({**RED, "choices": "red, blue"}, "choices must be a list"),
        ({**RED, "choices": [Box(0, 0, 1, 1, 9, 9), "red"]}, "a choice is a box, which is not a decision"),
        ({**RED, "choices": [{"value": Point}, "red"]}, "a choice is a point, which is not a decision"),
        ({**RED, "type": "box"}, "a box is not a decision (locate("),
        ({**RED, "type": "point"}, "a point is not a decision (locate("),
        (Box, "a box is not a decision (locate("),
        (Point(1, 1, 9, 9), "a point is not a decision (locate("),
        ({**RED, "instructions": " "}, "the instructions are empty"),
        ({**RED, "instructions": []}, "the instructions are empty"),
        ({**RED, "instructions": [" ", {"type": "text", "text": "\n"}]}, "the instructions are empty"),
        ({**RED, "name": 3}, "name must be text"),
        ({**RED, "type": []}, "unknown value '[]'"),
        ({**RED, "choices": ["\ud800", "blue"]}, "is not valid Unicode"),
        ({**RED, "levels": []}, "a choice has no field 'levels'"),
        ({"type": "choice", "instructions": "Colour?"}, "choices is missing"),
        ({"type": "score", "instructions": "?", "levels": ["low", "low"]}, "the level 'low' stands twice"),
        ({"type": "score", "instructions": "?", "levels": ["low"]}, "1 level (2 to 255 of them)"),
        ({"type": "boxes", "instructions": "?"}, "unknown value 'boxes'"),
        ({"instructions": "?"}, "type is missing"),
        (7, "must be a question, not int"),
        ("", "the instructions are empty"),
    ],
)
def test_a_fault_of_a_question_is_named(question: QuestionLike, said: str) -> None:
    with pytest.raises(RequestError) as failed:
        read_questions([question])
    assert said in str(failed.value)
    assert str(failed.value.param).startswith("questions[0]")
    assert "\n" not in str(failed.value)


def test_the_number_and_the_names_of_questions_are_checked() -> None:
    with pytest.raises(RequestError, match="no question"):
        read_questions([])
    with pytest.raises(RequestError, match="401 questions"):
        read_questions(["Is it new?"] * 401)
    with pytest.raises(RequestError, match="two questions have the name 'a'"):
        read_questions([Predicate("New?", "a"), Predicate("Old?", "a")])
    assert len(read_questions("Is it new?")) == 1


def test_a_name_is_text() -> None:
    with pytest.raises(RequestError, match="a question's name is list, not text"):
        Predicate("New?", ["a"])  # type: ignore[arg-type]


def test_text_and_boolean_of_one_spelling_are_two_options() -> None:
    labels = Choice("Which?", [True, "true", False]).labels
    assert {label.text: label.value for label in labels} == {"true (boolean)": True, "true": "true", "false": False}


@pytest.mark.parametrize("number", [2, 3, MAX_ORDERS, MAX_ORDERS + 5, 255])
def test_orders_do_not_depend_on_the_callers_and_put_each_option_first_once(number: int) -> None:
    values = [f"option {n}" for n in range(number)]
    shown = orders(Choice("Which?", values))
    assert shown == orders(Choice("Which?", values[::-1])) == orders(Choice("Which?", values[3:] + values[:3]))
    assert len({way[0] for way in shown}) == len(shown) == min(number, MAX_ORDERS)
    assert all(set(way) == set(shown[0]) for way in shown)


@pytest.mark.parametrize("question", [Predicate("New?"), Score("Good?", [Level("bad", "broken"), "good"])])
def test_other_questions_stand_forwards_and_backwards(question: Question) -> None:
    there, back = orders(question)
    assert there == back[::-1]


def test_descriptions_are_kept() -> None:
    assert (
        Choice("?", [Option("a", "first"), {"value": "b", "description": "second"}]).choices[1].description == "second"
    )
