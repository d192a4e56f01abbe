"""Reading an answer: where each value stands in the JSON, and how sure the tokens make it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl import analysis
from qvl.analysis.product import ProductAnalysis, ProductFields
from qvl.analysis.prompts import LANGUAGES, PRODUCT_PROMPTS, RETRY_PROMPTS, SCHEMA_PROMPTS
from qvl.errors import AnalysisError
from qvl.types import TokenLogprob

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
objects = st.dictionaries(st.text(min_size=1).filter(lambda name: "." not in name), values, max_size=4)


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves_of(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves_of(inner)]
    return [value]


@given(objects, st.sampled_from([None, 2]), st.booleans(), st.text(alphabet=" \nab", max_size=5))
def test_every_leaf_is_found_where_it_stands(data: dict[str, Any], indent: Any, ascii_only: bool, before: str) -> None:
    text = before + json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    found = [json.loads(text[span.start : span.end]) for span in analysis.value_spans(text)]
    assert found == leaves_of(data)


@given(objects, st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_confidence_is_the_product_over_the_tokens_of_a_value(data: dict[str, Any], cuts: list[int]) -> None:
    raw = json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
    pieces, position = [], 0
    while position < len(raw):
        length = cuts[len(pieces) % len(cuts)]
        pieces.append(raw[position : position + length])
        position += length
    tokens = [TokenLogprob(piece.decode("utf-8", "replace"), math.log(0.9), piece) for piece in pieces]
    whole, fields = analysis.confidences(raw.decode("utf-8", "surrogatepass"), tokens)
    assert (whole is None) == (not leaves_of(data))
    assert all(0 < value <= 0.9 + 1e-9 for value in fields.values())
    if whole is not None and fields:
        assert whole <= min(fields.values()) + 1e-9


def test_tokens_that_do_not_spell_the_text_give_no_confidence() -> None:
    assert analysis.confidences('{"a": 1}', [TokenLogprob("other", -1.0)]) == (None, {})
    assert analysis.confidences('{"a": 1}', None) == (None, {})


@pytest.mark.parametrize(
    ("text", "complete", "words"),
    [
        ("", True, "no JSON object"),
        ("[1, 2]", True, "no JSON object"),
        ("[" * 5000, True, "no JSON object"),
        ('{"a":' * 5000 + "1" + "}" * 5000, True, ""),
        ('{"brand": "NOR', False, "cut off"),
        ('{"brand": "x", "category": 3}', True, "category"),
        ('{"brand": "x", "category": "y", "price": 3}', True, "price"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_text(text: str, complete: bool, words: str) -> None:
    with pytest.raises(AnalysisError) as caught:
        analysis.parse(text, ProductAnalysis, complete=complete)
    assert words in caught.value.message
    assert caught.value.raw == text


@pytest.mark.parametrize("opening", ['{"a":', "["])
def test_an_answer_of_any_depth_is_read_or_refused(opening: str) -> None:
    closing = {"{": "}", "[": "]"}[opening[0]]
    for depth in range(50, 1500, 50):
        text = '{"brand": ' + opening * depth + "0.1000000000000000000001" + closing * depth + "}"
        with pytest.raises(AnalysisError):
            analysis.parse(text, ProductAnalysis, complete=True)


def test_every_language_has_every_prompt() -> None:
    assert {"en", "zh", "pt", "es"} <= set(LANGUAGES)
    assert set(PRODUCT_PROMPTS) == set(SCHEMA_PROMPTS) == set(RETRY_PROMPTS) == set(LANGUAGES)


def test_the_schema_has_only_what_the_model_can_know() -> None:
    assert list(analysis.generation_schema(ProductAnalysis)["properties"]) == list(ProductFields.model_fields)


def test_equal_analyses_are_equal_wherever_they_came_from() -> None:
    from qvl.types import Result

    when = ProductAnalysis(brand="a", category=None).created_at
    one, two = (ProductAnalysis(brand="a", category=None, created_at=when) for _ in range(2))
    one.came_from(Result(choices=()))
    assert one == two


WANT = '{"brand": "Norvik", "category": "mug", "attributes": {"color": "red"}}'


@pytest.mark.parametrize(
    "text",
    [
        WANT + "\n\nHope that helps {smile}",
        "The logo {in red} says it.\n\n" + WANT,
        f"Sure {{ok}}:\n```json\n{WANT}\n```\nDone {{x}}",
        f"```json\n[{WANT}]\n```",
        f"[{WANT}]",
        f"As in [1], it is [{WANT}].",
        '{"name": "an example"} is not it, but ' + WANT,
        '{"brand": null, "category": null} would be empty; rather:\n' + WANT,
        f'{{"result": {WANT}}}',
        f'Here: {{"result": {WANT}}} {{}}',
        f'<think>Perhaps {{"brand": "Other", "category": null}}?</think>\n{WANT}',
        f'Perhaps {{"brand": "Other", "category": null}}?</think>{WANT}',
        f"[[{WANT}]]",
        json.dumps(WANT),
        json.dumps(f"Sure:\n{WANT}"),
        f'{{"answer": [{WANT}]}}',
        f'{{"answer": {WANT}, "note": "x"}}',
        f'{{"note": {{"other": 1}}, "result": {{"answer": [[{WANT}]], "ok": true}}}}',
        json.dumps({"answer": WANT, "note": "x"}),
        f'I think {{"so": "</think>"}}</think>{WANT}',
        "Well {yes}: " + WANT.replace("}}", "},}") + " {no}",
        WANT.replace('"brand": "Norvik"', "\u201cbrand\u201d: \u201cNorvik\u201d"),
        WANT.replace('"', "'"),
    ],
)
def test_the_object_that_was_asked_for_is_found_among_other_text(text: str) -> None:
    found = analysis.parse(text, ProductAnalysis)
    assert (found.brand, found.category, found.attributes) == ("Norvik", "mug", {"color": "red"})


@pytest.mark.parametrize("before", ["", "So:\n", "hm</think>\n", "hm {x} [1] </think>", '{"a": "</think>"}</think>'])
def test_a_value_may_hold_the_tag_that_ends_reasoning(before: str) -> None:
    text = before + WANT.replace("Norvik", "Nor</think>vik")
    assert analysis.parse(text, ProductAnalysis).brand == "Nor</think>vik"


@pytest.mark.parametrize(
    "text",
    [
        *("{smile}", f"[{WANT}, {WANT}]", '{"result": {"other": 1}}', "{" * 5000, "{}" * 5000, '"' + WANT[:20]),
        f'{{"one": {WANT}, "two": {WANT}}}',
        f'{{"answer": [{WANT}, {WANT}], "note": "x"}}',
        f'{{"brand": 5, "inner": {WANT}}}',
        f"{WANT}</think>I do not know.",
        *("null", '"null"', '"{"', "[[[]]]", json.dumps(json.dumps([WANT, WANT]))),
    ],
)
def test_what_holds_no_such_object_is_still_refused(text: str) -> None:
    with pytest.raises(AnalysisError):
        analysis.parse(text, ProductAnalysis)


def test_confidence_is_of_the_object_that_was_taken() -> None:
    before = '{"brand": 1} is wrong, {x} too: '
    tokens = [TokenLogprob(before, math.log(0.1)), TokenLogprob(WANT, math.log(0.9))]
    start = analysis.find(before + WANT, ProductAnalysis, complete=True).start
    whole, fields = analysis.confidences(before + WANT, tokens, start)
    assert start == len(before)
    assert whole == pytest.approx(0.9)
    assert set(fields) == {"brand", "category", "attributes.color"}


def test_confidence_is_of_the_object_inside_another() -> None:
    before, after = '{"note": {"brand": 1}, "answer": ', "}"
    tokens = [TokenLogprob(before, math.log(0.1)), TokenLogprob(WANT, math.log(0.9)), TokenLogprob(after, -1.0)]
    start = analysis.find(before + WANT + after, ProductAnalysis, complete=True).start
    whole, fields = analysis.confidences(before + WANT + after, tokens, start)
    assert whole == pytest.approx(0.9)
    assert set(fields) == {"brand", "category", "attributes.color"}
    escaped = json.dumps(WANT)
    start = analysis.find(escaped, ProductAnalysis, complete=True).start
    assert analysis.confidences(escaped, [TokenLogprob(escaped, -1.0)], start) == (None, {})
