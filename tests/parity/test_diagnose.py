"""What is made of what two sides show and tell, and what is only called likely."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.backends.base import Capabilities
from qvl.decisions.questions import read_questions
from qvl.errors import BackendError
from qvl.parity import Case, compare
from qvl.parity.diagnose import Diagnosis
from qvl.parity.differences import differ
from qvl.parity.observation import Observation, TokenStep
from qvl.parity.probing import Probing
from qvl.parity.tally import ParityTally
from qvl.types import ChatRequest, Chunk, TokenLogprob
from tests.server.echo_backend import EchoBackend

SAME = {"dtype": "float32", "weights": "w", "quantisation": None}
CASE = Case("x", question="?")


def found(a: Observation, b: Observation, identities: tuple[dict, dict] = (SAME, SAME)) -> list[tuple[str, bool]]:
    """The (name, certain) of each cause."""
    diagnosis = Diagnosis(identities)
    one = differ(a, b)
    assert one.layer is not None
    diagnosis.add(CASE, one, a, b)
    return [(cause.name, cause.certain) for cause in diagnosis.causes()]


def said(text: str, reason: str, *, tokens: bool = True, logprob: float = -0.1) -> Observation:
    steps = [TokenStep(word, logprob, {word: logprob, "other": -3.0}) for word in text.split(" ")]
    return Observation("x", steps=tuple(steps) if tokens else (), text=text.replace(" ", ""), finish_reason=reason)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize(
    ("shorter", "longer", "named"),
    [
        # The longer one lacks the token that ends answers, and goes on to the limit of both.
        ("stop", "length", ("stop", True)),
        ("stop", "stop", ("stop", True)),
        ("length", "stop", ("length", True)),
        ("length", "length", ("length", True)),
        ("", "length", ("stop", False)),
    ],
)
def test_the_shorter_answer_tells_why_it_ended(shorter: str, longer: str, named: object, tokens: bool) -> None:
    few, many = said("a b", shorter, tokens=tokens), said("a b c d", longer, tokens=tokens)
    assert found(few, many) == [named]
    assert found(many, few) == [named]


def turns(system: str | None, rest: str = "<|im_start|>user\n?<|im_end|>\n") -> Observation:
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return Observation("x", template=head + rest, prompt_ids=(1,), text="a")


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        (turns(None), turns("You help."), ["system"]),
        (turns("You help."), turns("You are a judge."), ["system"]),
        (turns("You help.\nMuch."), turns("You help.\nLittle."), ["system"]),
        (turns("Same."), turns("Same.", "<|im_start|> user\n?<|im_end|>\n"), ["template"]),
        (turns(None), turns("You help.", "<|im_start|>user ?<|im_end|>\n"), ["system", "template"]),
        (turns("Same."), turns("Same.  "), ["template"]),
    ],
)
def test_a_system_message_is_told_from_the_rest_of_a_template(a: Observation, b: Observation, names: list[str]) -> None:
    assert [name for name, _ in found(a, b)] == names
    assert [name for name, _ in found(b, a)] == names


def test_other_ids_are_the_tokenizers_only_where_the_text_is_known_to_be_the_same() -> None:
    a = Observation("x", template="t", prompt_ids=(1, 2), text="a")
    b = dataclasses.replace(a, prompt_ids=(1, 3))
    assert found(a, b) == [("tokenizer", True)]
    for x, y in ((a, dataclasses.replace(b, template=None)), (dataclasses.replace(a, template=None), b)):
        assert found(x, y) == [("prompt", True)]


def test_another_count_may_be_that_of_pictures_whose_tokens_are_not_told() -> None:
    a = Observation("x", sizes=((8, 8),), pixels=("p",), picture_tokens=(4,), prompt_tokens=9, text="a")
    assert found(a, dataclasses.replace(a, prompt_tokens=8)) == [("prompt", True)]
    assert found(a, dataclasses.replace(a, prompt_tokens=8, picture_tokens=None)) == [("prompt", False)]


def test_what_both_sides_tell_alike_is_not_guessed() -> None:
    """In bfloat16 the company in a batch changes numbers, on some processors; the dtype of both is the same."""
    a, b = said("a b", "stop"), said("a b", "stop", logprob=-0.13)
    assert found(a, b) == [("kernels", False)]
    assert found(a, b, (SAME, {**SAME, "weights": "v"})) == [("weights", True)]
    assert found(a, b, (SAME, {})) == [("dtype", False)]


class TellingBackend(EchoBackend):
    """Tells log-probabilities; of those of `fault` the chosen tokens are not the likeliest."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, top_logprobs=5)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        lower = {"": 0.0, "penalty": 3.0, "sampling": 3.0 + len(self.requests)}[self.fault]
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.logprobs:
                    chunk = dataclasses.replace(chunk, logprobs=tuple(lowered(one, lower) for one in chunk.logprobs))
                yield chunk


def lowered(token: TokenLogprob, nats: float) -> TokenLogprob:
    chosen = dataclasses.replace(token.top[0], logprob=token.logprob - nats)
    return dataclasses.replace(token, logprob=token.logprob - nats, top=(chosen, *token.top[1:]))


@pytest.mark.parametrize("fault", ["penalty", "sampling"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_the_side_that_does_not_choose_the_likeliest_is_the_one_that_is_asked_again(fault: str, side: str) -> None:
    faulty, right = TellingBackend(fault), TellingBackend()
    a, b = (faulty, right) if side == "A" else (right, faulty)
    with Pipeline(backend=a, cache="off") as pipe_a, Pipeline(backend=b, cache="off") as pipe_b:
        report = compare(pipe_a, pipe_b, [Case(f"{place}", question="What is it?") for place in range(3)])
    (cause,) = report.causes
    assert (cause.name, cause.certain) == (fault, True)
    assert cause.evidence.startswith(side)


def test_a_side_that_cannot_be_asked_again_is_only_likely_to_sample() -> None:
    a = Observation("x", steps=(TokenStep("a", -2.0, {"b": -0.2, "a": -2.0}),), text="a")
    b = Observation("x", steps=(TokenStep("b", -0.2, {"b": -0.2, "a": -2.0}),), text="b")
    assert found(a, b) == [("sampling", False)]


def test_where_a_sampled_answer_ends_is_chance() -> None:
    diagnosis = Diagnosis((SAME, SAME))
    few, many = said("a b", "stop"), said("a b c d", "stop")
    diagnosis.add(CASE, differ(few, many), few, many)
    a = Observation("x", steps=(TokenStep("b", -0.2, {"b": -0.2, "a": -2.0}),), text="b")
    b = Observation("x", steps=(TokenStep("a", -2.0, {"b": -0.2, "a": -2.0}),), text="a")
    diagnosis.add(CASE, differ(a, b), a, b)
    assert [one.name for one in diagnosis.causes()] == ["sampling"]


def test_answers_that_fail_now_and_then_do_not_depend_on_the_batch() -> None:
    class FlakyBackend(TellingBackend):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
            if len(self.requests) % 2:
                self.requests.append(request)
                raise BackendError("try again")
            async with aclosing(super().stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk

    with Pipeline(backend=TellingBackend("penalty"), cache="off") as a, Pipeline(backend=FlakyBackend()) as b:
        report = compare(a, b, [Case(f"{place}", question="What is it?") for place in range(4)])
    assert report.failed[1] > 0
    assert {cause.name for cause in report.causes} == {"penalty"}


def test_the_tokens_that_decisions_took_are_no_prompt() -> None:
    """More is asked where more answers are probable, so equal prompts take other numbers of tokens."""
    asked = read_questions({"type": "choice", "instructions": "Which?", "choices": ["red", "blue"], "name": "colour"})

    class ThriftyBackend(TellingBackend):
        async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().stream(request)) as chunks:
                async for chunk in chunks:
                    more = chunk.usage and dataclasses.replace(chunk.usage, prompt_tokens=chunk.usage.prompt_tokens + 7)
                    yield dataclasses.replace(chunk, usage=more)

    case = Case("x", (Image.new("RGB", (64, 64), "red"),), questions=tuple(asked))
    with Pipeline(backend=TellingBackend(), cache="off") as a, Pipeline(backend=ThriftyBackend(), cache="off") as b:
        report = compare(a, b, [case])
    assert report.failed == (0, 0)
    assert "decisions" in report.shown
    assert "prompt" not in report.shown


def test_what_a_penalty_makes_of_analyses_is_no_other_chip() -> None:
    """Under a schema a token that is not the likeliest shows nothing; the texts show it."""
    chosen = TokenStep("b", -2.0, {"a": -0.2, "b": -2.0})
    a = Observation("x", steps=(TokenStep("a", -0.2, chosen.top),), text="a")
    diagnosis = Diagnosis((SAME, SAME))
    for fields in (None, {"brand": "a"}):
        whole = dataclasses.replace(a, fields=fields)
        other = dataclasses.replace(whole, steps=(chosen,), text="b", fields=fields and {"brand": "b"})
        diagnosis.add(CASE, differ(whole, other), whole, other)
    assert {one.name for one in diagnosis.causes()} == {"sampling", "kernels"}
    probing = Probing([], ParityTally(), diagnosis, 0.001, {"B": []})
    assert [(one.name, one.certain) for one in probing.causes()] == [("penalty", True)]
