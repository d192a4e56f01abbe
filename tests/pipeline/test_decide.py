"""`decide`: the probability of every possible answer, from the bundled model and from backends that know less."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from qvl import AsyncPipeline, Pipeline
from qvl.backends.base import Backend, Capabilities
from qvl.decisions import Choice, Decisions, Predicate, Score
from qvl.errors import ConfigError, ContextLengthError, QvlError, RefusalError, RequestError
from qvl.testing.asking import square
from qvl.types import ChatRequest, Chunk, SamplingParams, TokenLogprob, Usage
from tests.scripted_endpoint import ScriptedEndpoint, Text

COLOUR = Choice("What colour is it?", ["red", "red wine", "blue", "green"], "colour")
QUESTIONS = ["Is it new?", COLOUR, Score("How good is it?", ["poor", "fair", "good"], "good")]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline(cache="memory:") as pipeline:
        yield pipeline


def test_each_answer_has_a_whole_distribution(pipe: Pipeline) -> None:
    answers = pipe.decide(square(), QUESTIONS, "The seller says that it is red.")
    assert [answer.type for answer in answers] == ["predicate", "choice", "score"]
    for answer in answers:
        assert answer.probabilities is not None
        assert math.fsum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.value is not None
        assert answer.confidence == max(answer.probabilities.values()) == answer.probabilities[answer.value]
        assert answer.label_mass is not None
        assert 0 < answer.label_mass <= 1
        assert answer.method == "logits"
    assert list(answers["colour"].probabilities or ()) == ["red", "red wine", "blue", "green"]
    assert 0 <= (answers["good"].score or 0) <= 2


def test_shifting_options_moves_nothing(pipe: Pipeline) -> None:
    values = ["red", "red wine", "blue", "green"]
    found = []
    for shifted in itertools.permutations(values):
        answer = pipe.decide(square(), Choice("What colour is it?", shifted), cache="off")[0]
        found.append([(answer.probabilities or {})[value] for value in values])
    assert max(max(column) - min(column) for column in zip(*found, strict=True)) <= 0.01


def test_the_probability_is_that_of_the_chain_of_tokens(pipe: Pipeline) -> None:
    """Held against the prompt's own scores: one token after the other, with the label as the answer that was given."""
    labels = ["ab zebra", "ab yellow"]
    question = Choice("Which?", labels)
    answer = pipe.decide(square(), question, cache="off")[0]
    from qvl.decisions.questions import options_text, orders

    expected = dict.fromkeys(labels, 0.0)
    for way in orders(question):
        shares = {}
        for label in labels:
            said = [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": square()}, "Which?" + options_text(question, way)],
                },
                {"role": "assistant", "content": label},
            ]
            result = pipe.chat(said, continue_final_message=True, prompt_logprobs=0, max_tokens=1, cache="off")
            assert result.prompt is not None
            scores, text = [], ""
            for item in reversed(result.prompt.logprobs):
                if item is None or text == label:
                    break
                text = item.token + text
                scores.append(item.logprob)
            assert text == label
            shares[label] = math.exp(sum(scores))
        for label in labels:
            expected[label] += shares[label] / sum(shares.values()) / 2
    # Spellings other than the tokenizer's own have little of the whole.
    assert answer.probabilities == pytest.approx(expected, abs=0.05)


def test_a_new_question_about_known_pictures_asks_only_that_one(pipe: Pipeline) -> None:
    pipe.decide(square(2), QUESTIONS)
    again = pipe.decide(square(2), [*QUESTIONS, "Is it large?"])
    assert [answer.cache for answer in again] == ["hit", "hit", "hit", "miss"]
    turned = pipe.decide(square(2), Choice("What colour is it?", ["green", "blue", "red wine", "red"]))
    assert turned[0].cache == "hit"
    assert list(turned[0].probabilities or ()) == ["green", "blue", "red wine", "red"]
    described = pipe.decide(square(2), replace_description())
    assert described[0].cache == "miss"


def replace_description() -> Choice:
    return Choice("What colour is it?", [{"value": "red", "description": "dark"}, "red wine", "blue", "green"])


def test_a_picture_may_stand_in_a_question(pipe: Pipeline) -> None:
    same = [Predicate(["Is it this one?", {"type": "image", "image": square(n)}]) for n in (1, 2)]
    answers = pipe.decide(square(1), same, cache="off")
    assert answers[0].asked == "Is it this one? [picture]"
    assert answers[0].usage.image_tokens > pipe.decide(square(1), "Is it?", cache="off")[0].usage.image_tokens


def test_more_options_than_ids_in_a_request(pipe: Pipeline) -> None:
    answer = pipe.decide(
        square(), Choice("Which?", [f"{chr(a)}{chr(b)}" for a in range(97, 112) for b in range(65, 82)])
    )
    assert len(answer[0].probabilities or ()) == 255


def test_a_question_that_does_not_fit_the_context_is_named(pipe: Pipeline) -> None:
    long = Choice("Which?", [{"value": f"option {n}", "description": "word " * 20} for n in range(200)])
    with pytest.raises(ContextLengthError, match=r"questions\[1\]: .* does not fit") as failed:
        pipe.decide(square(), ["Is it new?", long])
    assert failed.value.param == "questions[1]"
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__, "its traceback is one, not that of the same error before it"


def test_what_is_not_a_parameter_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match="no parameter 'temperature'"):
        pipe.decide(square(), "Is it new?", temperature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="the context is a int"):
        pipe.decide(square(), "Is it new?", 7)  # type: ignore[arg-type]


def test_asynchronously_and_as_html() -> None:
    async def work() -> Decisions:
        async with AsyncPipeline(cache="off") as pipeline:
            return await pipeline.decide(square(), ["Is it <new>?", COLOUR])

    answers = asyncio.run(work())
    page = answers._repr_html_()
    assert "Is it &lt;new&gt;?" in page
    assert "red wine" in page
    assert [item["cache"] for item in answers.to_json()["answers"]] == ["bypass", "bypass"]


class Known(Backend):
    """A backend that answers with what it is given, and does no more than `have`."""

    name, model = "known", "one"

    def __init__(self, have: Capabilities, text: str, top: tuple[TokenLogprob, ...] = ()) -> None:
        self._have, self._text, self._top = have, text, top
        self.prompts: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return self._have

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        self.prompts.append(request.messages[-1].text)
        if self._text == "refuse":
            raise RefusalError("the model declined")
        told = (TokenLogprob(self._text, -0.1, top=self._top),) if request.sampling.wants_logprobs else ()
        yield Chunk(text=self._text, logprobs=told)
        yield Chunk(finish_reason="stop", usage=Usage(1, 1))


TOP = Capabilities(top_logprobs=5)


def _decide(backend: Backend, question: object) -> Decisions:
    with Pipeline(backend=backend, cache="off") as pipeline:
        return pipeline.decide([], [question])  # type: ignore[list-item]


def test_an_endpoint_with_top_logprobs_is_asked_for_letters() -> None:
    top = tuple(TokenLogprob(text, math.log(share)) for text, share in (("A", 0.4), (" b", 0.4), ("The", 0.2)))
    backend = Known(TOP, "A", top)
    answer = _decide(backend, Choice("Which?", ["brown", "black"]))[0]
    # Half the mass at each place, whatever stands there.
    assert answer.probabilities == pytest.approx({"brown": 0.5, "black": 0.5})
    assert answer.label_mass == pytest.approx(0.8)
    assert answer.method == "top_logprobs"
    assert "by letters" in answer.notes[0]
    assert "A. black\nB. brown" in backend.prompts[0]


def test_yes_and_no_are_read_from_top_logprobs() -> None:
    top = tuple(TokenLogprob(text, math.log(share)) for text, share in (("Yes", 0.5), ("yes", 0.1), ("No", 0.2)))
    answer = _decide(Known(TOP, "Yes", top), "Is it new?")[0]
    assert answer.probability == pytest.approx(0.75)
    assert answer.label_mass == pytest.approx(0.8)


def test_more_options_than_an_endpoint_lists_are_asked_for_the_answer_alone() -> None:
    answer = _decide(Known(TOP, "c"), Choice("Which?", list("abcdef")))[0]
    assert (answer.value, answer.probabilities, answer.confidence, answer.method) == ("c", None, None, "choice")
    assert answer.notes == (
        "the answer stands alone, without probabilities: this backend tells only the 5 likeliest tokens, "
        "and there are 6 options",
    )


def test_an_endpoint_that_sends_no_logprobs_is_asked_for_the_answer_alone() -> None:
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Text("A"), Text("abc"))
        with Pipeline("openai:mute", base_url=endpoint.url, probe=False, cache="off") as pipe:
            answer = pipe.decide(square(), Choice("Which?", ["a", "ab", "abc"]))[0]
        assert [chat.body.get("logprobs") for chat in endpoint.chats] == [True, None]
    assert (answer.value, answer.probabilities, answer.confidence, answer.method) == ("abc", None, None, "choice")
    assert answer.notes[-1] == "the answer stands alone, without probabilities: the answer has no logprobs"


def test_an_answer_that_differs_by_case_alone_is_the_one_that_was_spelt() -> None:
    values = ["c", "C", "a", "b", "d", "e"]
    for text in ("C", "c."):
        assert _decide(Known(TOP, text), Choice("Which?", values))[0].value == text.rstrip(".")
    assert _decide(Known(TOP, "A"), Choice("Which?", values))[0].value == "a"


@pytest.mark.parametrize("text", ["Acme Inc.", "acme inc.", "**Acme Inc.**", '"Acme Inc"'])
def test_an_answer_that_ends_with_a_full_stop_is_known_with_and_without_it(text: str) -> None:
    values = ["Acme Inc.", "Acme Inc. & Co.", "b", "c", "d", "e"]
    assert _decide(Known(TOP, text), Choice("Which?", values))[0].value == "Acme Inc."


def test_what_says_nothing_about_the_answers_is_a_refusal_of_that_question_alone() -> None:
    """By the first tokens, in one of the orders, and by the answer alone."""
    silent = _decide(Known(TOP, "Perhaps", (TokenLogprob("Perhaps", -0.1),)), "Is it new?")[0]
    assert (silent.value, silent.probabilities, silent.confidence, silent.label_mass) == (None, None, None, 0.0)
    assert silent.refused
    assert silent.notes == ("none of the possible answers is among what the model would say",)
    alone = _decide(Known(TOP, "Perhaps"), Choice("Which?", list("abcdef")))[0]
    assert alone.refused
    assert alone.notes[-1] == "the model answered 'Perhaps', which is none of the possible answers"

    class Moody(Known):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
            self._top = (TokenLogprob("yes" if "yes or no" in request.messages[-1].text else "hm", -0.5),)
            async for chunk in super().stream(request):
                yield chunk

    once = _decide(Moody(TOP, "yes"), "Is it new?")[0]
    assert once.probabilities == {True: 1.0, False: 0.0}
    assert once.label_mass == pytest.approx(math.exp(-0.5) / 2)
    assert "in 1 of 2 orders" in once.notes[-1]


@pytest.mark.parametrize(("logprob", "said"), [(math.nan, "NaN"), (math.inf, None), (1e9, None)])
def test_log_probabilities_that_are_none_do_no_harm(logprob: float, said: str | None) -> None:
    top = (TokenLogprob("yes", logprob), TokenLogprob("no", -math.inf))
    if said is None:
        assert _decide(Known(TOP, "yes", top), "Is it new?")[0].probability == 1.0
        return
    with pytest.raises(QvlError, match=said):
        _decide(Known(TOP, "yes", top), "Is it new?")


def test_without_logprobs_the_answer_has_no_probability() -> None:
    answer = _decide(Known(replace(TOP, sampling=SamplingParams.assumed() - {"logprobs"}), "Yes."), "Is it new?")[0]
    assert (answer.value, answer.probabilities, answer.confidence, answer.label_mass) == (True, None, None, None)
    assert answer.method == "choice"
    assert answer.notes == ("the answer stands alone, without probabilities: this backend tells none",)


def test_a_refusal_is_of_its_question_alone() -> None:
    answer = _decide(Known(TOP, "refuse"), "Is it new?")[0]
    assert answer.refused
    assert answer.value is None
    assert "the model declined" in answer.notes[0]


def test_a_picture_for_a_backend_without_eyes_is_refused() -> None:
    with pytest.raises(RequestError, match="does not support pictures"):
        _decide(Known(TOP, "Yes"), Predicate(["Is it this?", {"type": "image", "image": square()}]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "a NoneType is not a picture"),
        ([None], "a NoneType is not a picture"),
        ({"type": "image"}, "pictures[0]: has no picture"),
        ([square(), {"type": "imag"}], "pictures[1].type: unknown value 'imag'"),
    ],
)
def test_what_is_no_picture_is_told_by_the_argument(pipe: Pipeline, given: Any, words: str) -> None:
    with pytest.raises(QvlError, match=re.escape(words)):
        pipe.decide(given, "Is it new?")


def test_no_picture_at_all_is_told_to_who_asks(pipe: Pipeline) -> None:
    nothing: Any = None
    with pytest.raises(QvlError, match="a NoneType is not a picture"):
        pipe.ask(nothing, "Is it new?")


def test_decisions_are_taken_by_number_name_and_range(pipe: Pipeline) -> None:
    answers = pipe.decide([], QUESTIONS)
    assert answers[:1] == (answers[0],)
    assert answers[1:] == (answers["colour"], answers[-1])
    assert answers[5:] == ()
    with pytest.raises(KeyError, match="size"):
        _ = answers["size"]
