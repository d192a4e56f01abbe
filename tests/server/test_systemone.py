"""`POST /v1/systemone`, over the bundled model: the same questions as `/v1/decisions`, in another form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.errors import RequestError
from qvl.server.systemone_0_2 import Asset, SystemOneRequest, input_of
from tests.server.conftest import Running, data_url, start

NEW = {"type": "noul", "instructions": "Is it new?"}
COLOUR = {"type": "choice", "instructions": "Colour?", "criteria": {"red": None, "blue": {"like": ["the sea"]}}}
WORN = {"type": "score", "instructions": ["How worn?"], "criteria": ["not at all", {"text": "a little"}, "very"]}


@pytest.fixture(scope="module")
def bundled() -> Iterator[Running]:
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20))
    yield running
    running.stop()


def _asset(colour: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image", "format": "png", "data_base64": data_url(colour).partition(",")[2], **fields}


def _ask(running: Running, **body: Any) -> dict[str, Any]:
    answer = running.post("/v1/systemone", {"state": "A mug.", "questions": {"q": NEW}, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_every_kind_of_question_is_answered_under_its_name(bundled: Running) -> None:
    state = {"title": "A mug", "seen": [1, None, {"by": "Zoë"}]}
    told = _ask(bundled, model="bundled", state=state, questions={"a b": NEW, "": COLOUR, "w": WORN})
    assert set(told) == {"model", "answers", "usage"}
    new, colour, worn = (told["answers"][name] for name in ("a b", "", "w"))
    assert 0 < new["noul"] < 1
    shares = colour["probabilities"]
    assert list(shares) == ["red", "blue"]
    assert colour["choice"] == max(shares, key=shares.get)
    assert colour["confidence"] == pytest.approx(2 * max(shares.values()) - 1)
    assert worn["legend"] == {"0": "not at all", "1": {"text": "a little"}, "2": "very"}
    assert worn["score"] == pytest.approx(sum(int(level) * share for level, share in worn["probabilities"].items()))
    levels = list(worn["probabilities"].values())
    assert math.fsum(levels) == pytest.approx(1)
    away = sum(share * abs(level - levels.index(max(levels))) for level, share in enumerate(levels))
    assert worn["confidence"] == pytest.approx(max(0.0, 1 - away / (2 / 3)))
    assert told["usage"]["input_tokens"] > 0
    assert all(0 < answer["x_label_mass"] <= 1 and answer["x_method"] == "logits" for answer in (new, colour, worn))


def test_the_answers_are_those_of_the_other_route(bundled: Running) -> None:
    """Whatever a question's name, and whatever else is asked."""
    questions = [{"type": "predicate", "instructions": "Is it new?"}]
    body = {"input": [{"role": "user", "content": "A mug."}], "questions": questions}
    other = bundled.post("/v1/decisions", body).json()["answers"][0]["probability"]
    for questions_of in ({"q": NEW}, {"z": COLOUR, "other name": NEW}):
        answers = _ask(bundled, questions=questions_of)["answers"]
        assert next(one["noul"] for one in answers.values() if "noul" in one) == pytest.approx(other)


def test_what_yes_and_no_mean_may_be_all_that_is_asked(bundled: Running) -> None:
    told = {}
    for criteria in ({"true": "It is red."}, {"false": ["It is blue."]}, {"true": None, "false": "It is blue."}):
        told[json.dumps(criteria)] = _ask(bundled, questions={"q": {"type": "noul", "criteria": criteria}})
    shares = [one["answers"]["q"]["noul"] for one in told.values()]
    assert shares[0] != shares[1]
    assert _ask(bundled, questions={"q": {**NEW, "criteria": {"true": "Unused."}}})["answers"]["q"]["noul"] != shares[0]


def test_assets_stand_where_their_names_stand(bundled: Running) -> None:
    """In a text, deep in an object, in instructions; a name that JSON writes otherwise, one that begins another."""
    assets = {"img-1": _asset("red"), "img-11": _asset("blue"), 'a "b"': _asset("green")}
    state = {"first": "<img-11> and", "others": ["img-1", 'see a "b"!']}
    question = {"type": "noul", "instructions": "Is it like img-11?"}
    told = _ask(bundled, state=state, assets=assets, questions={"q": question})
    bare = _ask(bundled, state=state, questions={"q": question})
    # Four pictures where there were names, none in a key or in what JSON itself writes.
    assert told["usage"]["input_tokens"] > bare["usage"]["input_tokens"] + 4 * 2
    swapped = {**assets, "img-1": _asset("blue"), "img-11": _asset("red")}
    assert _ask(bundled, state=state, assets=swapped, questions={"q": question})["answers"] != told["answers"]


def test_assets_stand_in_texts_alone_and_in_linear_time() -> None:
    """Not in keys, nor in what JSON itself writes; the longest name counts; a million letters are read at once."""
    asset = Asset(data_base64=_asset("red")["data_base64"])
    bare = {"type": "noul", "instructions": "?"}
    names = ("n", "true", "a", "aa", "\n", '"')
    body = SystemOneRequest(
        state={"n": True, "t": 'n\n"aaa', "k": [1, "b", "true"]},
        questions={"q": bare},
        assets=dict.fromkeys(names, asset),
    )
    read = input_of(body)
    assert [path.removeprefix("assets.") for path in read.paths] == ["n", "\n", '"', "aa", "a", "true"]
    texts = "".join(part.get("text", "*") for part in read.messages[0]["content"])
    assert json.loads(texts) == {"n": True, "t": "*****", "k": [1, "b", "*"]}
    long = SystemOneRequest(
        state="a" * 1_000_000, questions={"q": bare}, assets={"a" * size + "b": asset for size in range(1, 60)}
    )
    with pytest.raises(RequestError, match="is named neither"):
        input_of(long)
    many = SystemOneRequest(state="a" * 1_000_000, questions={"q": bare}, assets={"a": asset})
    with pytest.raises(RequestError, match="more than 1024 places"):
        input_of(many)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"state": ""}, "state"),
        ({"state": 7}, "state"),
        ({"state": None}, "state"),
        ({"questions": {}}, "questions"),
        ({"questions": [NEW]}, "questions"),
        ({"questions": {"q": {"type": "box", "instructions": "Where?"}}}, "questions.q.type"),
        ({"questions": {"q": {"instructions": "?"}}}, "questions.q.type"),
        ({"questions": {"q": {"type": "noul"}}}, "questions.q.instructions"),
        ({"questions": {"q": {**NEW, "instructions": 7}}}, "questions.q.instructions"),
        ({"questions": {"q": {**NEW, "instructions": " "}}}, "questions.q.instructions"),
        ({"questions": {"q": {**NEW, "criteria": {"maybe": "?"}}}}, "questions.q.criteria"),
        ({"questions": {"q": {**NEW, "choices": []}}}, "questions.q.choices"),
        ({"questions": {"a": NEW, "q": {**COLOUR, "criteria": {"red": None}}}}, "questions.q.criteria"),
        ({"questions": {"q": {**COLOUR, "criteria": ["red", "blue"]}}}, "questions.q.criteria"),
        ({"questions": {"q": {**COLOUR, "criteria": {"red": None, " red": None}}}}, "questions.q.criteria"),
        ({"questions": {"q": {**COLOUR, "criteria": {str(n): None for n in range(256)}}}}, "questions.q.criteria"),
        ({"questions": {"q": {**COLOUR, "criteria": {"red": 7, "blue": None}}}}, "questions.q.criteria.red"),
        ({"questions": {"q": {**WORN, "criteria": {"0": "not"}}}}, "questions.q.criteria"),
        ({"questions": {"q": {**WORN, "criteria": ["not", None]}}}, "questions.q.criteria[1]"),
        ({"assets": {"x": _asset("red")}}, "assets.x"),
        ({"assets": {"mug": _asset("red", data_base64="??")}}, "assets.mug"),
        ({"assets": {"mug": {"type": "image", "part": "asset-0"}}}, "assets.mug"),
        ({"assets": {"": _asset("red")}}, "assets"),
        ({"assets": {"red": _asset("red")}, "questions": {"q": COLOUR}, "state": "red"}, None),
        ({"assets": {"sea": _asset("red")}, "questions": {"q": COLOUR}, "state": "sea"}, "questions.q.criteria.blue"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_input_is_named_in_the_form_of_this_api(
    bundled: Running, change: dict[str, Any], where: str | None
) -> None:
    body = {"state": "A mug.", "questions": {"q": NEW}, **change}
    answer = bundled.post("/v1/systemone", body)
    if where is None:
        # The name of an option is no place for a picture, and no text that stands for one either.
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 422, answer.text
    (fault,) = answer.json()["detail"]
    assert fault["loc"][0] == "body"
    assert str(fault["loc"][1]).startswith(where), answer.text
    assert set(fault) == {"loc", "msg", "type"}
    assert "\n" not in fault["msg"]
    assert answer.headers["x-typesafe-request-id"] == answer.headers["x-request-id"]


def test_numbers_that_json_does_not_know_are_refused(bundled: Running) -> None:
    for path, text in (
        ("/v1/systemone", '{"state": {"a": NaN}, "questions": {"q": {"type": "noul", "instructions": "?"}}}'),
        (
            "/v1/decisions",
            '{"input": [{"role": "user", "content": [{"type": "input_json", "data": {"a": -Infinity}}]}],'
            ' "questions": [{"type": "predicate", "instructions": "?"}]}',
        ),
    ):
        with bundled.client() as client:
            answer = client.post(path, content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        assert "NaN" in answer.text


def test_other_errors_have_the_form_of_this_api_too(bundled: Running) -> None:
    answer = bundled.post("/v1/systemone", {"model": "jev-latest", "state": "A mug.", "questions": {"q": NEW}})
    assert answer.status_code == 404
    assert answer.json()["detail"]["error_type"] == "not_found_error"
    assert "jev-latest" in answer.json()["detail"]["message"]
