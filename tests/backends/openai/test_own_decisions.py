"""An endpoint's own `/v1/decisions` is asked where there is one, and where it will not the others are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qvl import Pipeline
from qvl.backends.openai.backend import OpenAIBackend
from qvl.decisions import Choice, Decision, Predicate, Score
from qvl.testing.asking import square
from tests.scripted_endpoint import Received, ScriptedEndpoint, ScriptedExchange

COLOUR = Choice("Which colour?", ["red", {"value": "blue", "description": "any"}, "green"])
Told = tuple[int, Any]


class Deciding(ScriptedEndpoint):
    """The scripted endpoint with decisions: `decide` has the status and the body of each answer."""

    def __init__(self, decide: Callable[[Any], Told], **options: Any) -> None:
        super().__init__(**options)
        self.decide = decide

    @property
    def decisions(self) -> list[Received]:
        return [received for received in self.requests if received.path.endswith("/v1/decisions")]

    async def _respond(self, exchange: ScriptedExchange) -> None:
        if exchange.received.path.endswith("/v1/decisions"):
            await exchange.whole(*self.decide(exchange.received.body))
        else:
            await super()._respond(exchange)


def _pictures(body: Any) -> int:
    parts = [part for item in body["input"] for part in item["content"] if isinstance(item["content"], list)]
    return sum(part["type"] == "input_image" for part in parts)


def first_is_best(body: Any) -> Told:
    """Favours what stands first: 0.7 of it, and the others alike."""
    answers = []
    for question in body["questions"]:
        rows = [
            {key: option[key] for key in ("value", "label") if key in option}
            for option in (question.get("choices") or question.get("levels") or [])
        ]
        for number, row in enumerate(rows):
            row["probability"] = 0.3 / (len(rows) - 1) if number else 0.7
        told: dict[str, Any] = {"probabilities": rows} if rows else {"probability": 0.8}
        answers.append({"type": question["type"], "name": None, **told})
    usage = {
        "input_tokens": 10 + 50 * _pictures(body),
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 1,
        "total_tokens": 11,
    }
    return 200, {"answers": answers, "model": body["model"], "usage": usage}


def text_only(body: Any) -> Told:
    if _pictures(body):
        return 400, {"error": {"message": "Decisions supports text input only", "type": "invalid_request_error"}}
    return first_is_best(body)


@pytest.fixture
def deciding() -> Iterator[Callable[..., Deciding]]:
    started: list[Deciding] = []

    def make(decide: Callable[[Any], Told] = first_is_best, **options: Any) -> Deciding:
        started.append(Deciding(decide, **options))
        started[-1].start()
        return started[-1]

    yield make
    for endpoint in started:
        endpoint.stop()


def _decide(endpoint: Deciding, *questions: Any, picture: bool = False) -> list[Decision]:
    with Pipeline(backend=OpenAIBackend("echo", base_url=endpoint.url, max_retries=0), cache="off") as pipe:
        return list(pipe.decide(square() if picture else [], list(questions), "A mug."))


def test_what_the_endpoint_says_is_taken_free_of_its_leaning_to_a_place(deciding: Callable[..., Deciding]) -> None:
    endpoint = deciding()
    new, colour, good = _decide(endpoint, "Is it new?", COLOUR, Score("How good?", ["bad", "good"]), picture=True)
    assert (new.method, new.probability, new.label_mass) == ("decisions", pytest.approx(0.8), None)
    assert colour.probabilities == pytest.approx(dict.fromkeys(("red", "blue", "green"), 1 / 3))
    # The order of levels is what they mean.
    assert good.probabilities == pytest.approx({"bad": 0.7, "good": 0.3})
    assert (colour.usage.prompt_tokens, colour.usage.cached_tokens) == (60, 4)
    probes, sent = endpoint.decisions[:2], [received.body for received in endpoint.decisions[2:]]
    assert [_pictures(probe.body) for probe in probes] == [0, 1]
    assert sorted(len(body["questions"]) for body in sent) == [1, 1, 3]
    asked = next(body["questions"] for body in sent if len(body["questions"]) == 3)
    assert [question["choices"][0]["value"] for question in asked] == ["blue", "green", "red"]
    assert asked[0]["choices"][0] == {"value": "blue", "description": "any"}
    assert asked[0]["instructions"] == "Which colour?"


def test_a_picture_in_a_question_stays_in_it(deciding: Callable[..., Deciding]) -> None:
    endpoint = deciding()
    _decide(endpoint, Predicate(["Is it this?", {"type": "image", "image": square(3)}]))
    (question,) = endpoint.decisions[-1].body["questions"]
    assert [part["type"] for part in question["instructions"]] == ["input_text", "input_image"]
    assert endpoint.decisions[-1].body["input"] == [{"type": "message", "role": "user", "content": "A mug."}]


def test_an_endpoint_that_decides_about_text_alone_is_asked_otherwise_about_pictures(
    deciding: Callable[..., Deciding],
) -> None:
    endpoint = deciding(text_only)
    assert _decide(endpoint, "Is it new?")[0].method == "decisions"
    assert _decide(endpoint, "Is it new?", picture=True)[0].method == "top_logprobs"


@pytest.mark.parametrize(
    "told",
    [
        (404, {"detail": "Not Found"}),
        (400, {"error": {"message": "this model has no decisions"}}),
        (422, {"detail": "no"}),
        (200, {"object": "list", "data": []}),
        (200, {"answers": [{"type": "predicate", "probability": math.pi}]}),
        (200, {"answers": [{"type": "predicate", "probability": True}]}),
        (200, {"answers": []}),
        (200, ["answers"]),
        (200, "<html>Welcome</html>"),
    ],
)
def test_without_decisions_the_endpoint_is_asked_otherwise_and_not_looked_at_again(
    deciding: Callable[..., Deciding], told: Told
) -> None:
    endpoint = deciding(lambda body: told)
    answers = _decide(endpoint, "Is it new?", "Is it red?")
    assert [answer.method for answer in answers] == ["top_logprobs", "top_logprobs"]
    assert not any("own decisions" in note for answer in answers for note in answer.notes)
    assert len(endpoint.decisions) == 1


@pytest.mark.parametrize(
    "broken",
    [
        (500, {"error": {"message": "out of memory"}}),
        (400, {"error": {"message": "at most 2 choices"}}),
        (200, {"answers": [{"type": "choice", "probabilities": [{"value": "red", "probability": 1}]}] * 3}),
        (200, {"answers": [{"type": "choice", "probabilities": None}] * 3}),
        (200, {"answers": [{"type": "choice", "probabilities": [{"value": ["red"], "probability": 1}]}] * 3}),
        (200, {"answers": [None] * 3}),
    ],
)
def test_a_question_that_it_cannot_answer_is_asked_otherwise_and_that_is_said(
    deciding: Callable[..., Deciding], broken: Told
) -> None:
    endpoint = deciding(lambda body: broken if len(body["questions"]) > 1 else first_is_best(body))
    new, colour = _decide(endpoint, "Is it new?", COLOUR)
    assert (new.method, new.notes) == ("decisions", ())
    assert colour.method == "top_logprobs"
    assert "the endpoint's own decisions failed, so it was asked otherwise" in colour.notes[0]


def test_a_refusal_is_of_its_question(deciding: Callable[..., Deciding]) -> None:
    def half(body: Any) -> Told:
        status, told = first_is_best(body)
        if len(body["questions"]) == 3:
            told["answers"] = [{"type": "refusal", "name": None}] * 3
        return status, told

    new, colour = _decide(deciding(half), "Is it new?", COLOUR)
    assert not new.refused
    assert (colour.refused, colour.value, colour.method) == (True, None, "decisions")


def test_without_probes_nothing_is_looked_for(deciding: Callable[..., Deciding]) -> None:
    endpoint = deciding()
    backend = OpenAIBackend("echo", base_url=endpoint.url, probe=False)
    with Pipeline(backend=backend, cache="off") as pipe:
        assert pipe.decide([], "Is it new?")[0].method == "top_logprobs"
    assert not endpoint.decisions
