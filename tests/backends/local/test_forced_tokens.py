"""Tokens that a grammar leaves no choice about: they take no step, and everything else is as without them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_runner import Runner
from qvl.types import ChatRequest, Result, Tool
from qvl.types import ResponseFormat as Format
from tests.backends.local.intercepted import Intercepted
from tests.backends.local.requests import ask, freed, run, run_together

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.backends.local.engine_request import EngineRequest
    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.scheduling.step import Step
    from tests.backends.local.conftest import Opener
    from tests.backends.local.reference import Reference

SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"enum": ["mug", "shoe", "shirt", "bag"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
        "material": {"type": ["string", "null"], "maxLength": 6},
    },
    "required": ["category", "count", "notes", "material"],
    "additionalProperties": False,
}
FORM = Format("json_schema", schema=SCHEMA)
NOTES = {"type": "array", "items": {"type": "string", "minLength": 40, "maxLength": 40}, "minItems": 4, "maxItems": 4}
LONG_FORM = Format("json_schema", schema=SCHEMA | {"properties": SCHEMA["properties"] | {"notes": NOTES}})
TOOLS = (
    Tool("find_product", parameters={"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}),
    Tool("find_price", parameters={"type": "object", "properties": {"low": {"type": "boolean"}}, "required": ["low"]}),
)
# Letters of which no two are one token of the bundled vocabulary: there is one way to spell them.
LONELY = "QZXJ"


class Watched(Intercepted):
    """Keeps the sequences of its requests, in order of arrival, to see their tokens."""

    sequences: list[Sequence]

    def arrives(self, request: EngineRequest) -> None:
        self.sequences = [*getattr(self, "sequences", ()), *request.sequences]


def forcing(backend: LocalBackend, on: bool) -> LocalBackend:
    assert backend._loaded is not None
    backend._loaded.engine.forces = on
    return backend


def guided(place: int, **sampling: Any) -> ChatRequest:
    parts = [place % 5] if place % 2 else []
    return ask(*parts, "Describe it. " * (1 + place % 7), **{"max_tokens": 250, **sampling}).replace(
        response_format=FORM
    )


def told(result: Result) -> list[Any]:
    return [(choice.text, choice.tool_calls and choice.tool_calls[0].arguments, choice.finish_reason, choice.logprobs)
            for choice in result.choices]  # fmt: skip


def test_every_free_token_is_the_best_of_transformers_and_every_other_one_is_forced(
    opened: Opener, random_folder: Path, random_reference: Reference
) -> None:
    backend = opened(random_folder, kind=Watched, max_num_batched_tokens=48, max_num_seqs=8)
    assert isinstance(backend, Watched)
    asked = [guided(place) for place in range(6)]
    results = run(backend, *asked)
    assert backend._loaded is not None
    grammars = backend._loaded.maker.grammars
    for sequence in backend.sequences:
        place = next(
            n for n in range(6) if len(backend._loaded.processor.prepare(asked[n]).tokens) == sequence.num_prompt
        )
        inputs = random_reference.inputs(asked[place])
        assert inputs["input_ids"][0].tolist() == sequence.tokens[: sequence.num_prompt]
        whole = torch.tensor([sequence.tokens])
        inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (whole == random_reference.model.config.image_token_id).int()
        with torch.inference_mode():
            logits = random_reference.model(**inputs).logits[0].float()
        matcher, forced = grammars.matcher(asked[place]), []
        assert matcher is not None
        for at in range(sequence.num_prompt, len(sequence.tokens)):
            forced = forced or grammars.forced(matcher)
            if forced:
                assert sequence.tokens[at] == forced.pop(0)
            else:
                mask = grammars.mask([matcher], torch.device("cpu"))[0]
                assert sequence.tokens[at] == int(logits[at - 1].masked_fill(mask, float("-inf")).argmax())
            assert matcher.consume_token(sequence.tokens[at])
        assert json.loads(results[place].text)["category"] in ("mug", "shoe", "shirt", "bag")
    stats = backend.stats()
    assert 0 < stats["forced_tokens"] < stats["generated_tokens"]
    assert sum(result.usage.completion_tokens for result in results) == stats["generated_tokens"]


def test_a_form_with_one_spelling_gives_the_same_tokens_with_and_without(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    form = Format("regex", pattern=f"([{LONELY}])QZ([{LONELY}]ZQX){{2}}[{LONELY}]JJ")
    asked = [
        ask("Say hello.", logprobs=3, n=2, seed=1, temperature=temperature, max_tokens=20).replace(response_format=form)
        for temperature in (0.0, 1.0)
    ]
    with_them = [told(result) for result in run(forcing(backend, True), *asked)]
    assert backend.stats()["forced_tokens"] > 0
    without = [told(result) for result in run(forcing(backend, False), *asked)]
    assert [[part[:3] for part in one] for one in with_them] == [[part[:3] for part in one] for one in without]
    for one, other in zip(with_them, without, strict=True):
        for (*_, logprobs), (*_, expected) in zip(one, other, strict=True):
            assert [token.token for token in logprobs] == [token.token for token in expected]
            assert [t.logprob for t in logprobs] == pytest.approx([t.logprob for t in expected], abs=1e-4)
            assert [len(token.top) for token in logprobs] == [len(token.top) for token in expected]


def test_an_answer_is_the_same_alone_among_others_and_when_it_gives_way(opened: Opener, random_folder: Path) -> None:
    words = ask("Say hello. " * 19).messages
    asked = [
        guided(place, seed=place, temperature=0.8 * (place % 2)).replace(messages=words, response_format=LONG_FORM)
        for place in range(6)
    ]
    calm = opened(random_folder, max_num_seqs=1, prefix_cache=False)
    # Memory for three rows of 256 or one of 512: every answer outgrows its row, and younger ones give theirs back.
    tight = opened(
        random_folder, kv_cache_bytes=780 * 768, max_model_len=512, max_num_batched_tokens=40, max_num_seqs=8
    )
    assert [told(result) for result in run_together(tight, *asked)] == [told(result) for result in run(calm, *asked)]
    freed(tight)
    assert tight.stats()["num_preemptions"] > 0


def test_a_form_without_a_choice_takes_no_step(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    only = ask(1, "Say it.", n=2, max_tokens=20, logprobs=1).replace(
        response_format=Format("choice", choices=("certainly",))
    )
    (result,) = run(backend, only)
    assert [choice.text for choice in result.choices] == ["certainly"] * 2
    assert {choice.finish_reason for choice in result.choices} == {"stop"}
    assert result.logprobs is not None
    assert "".join(token.token for token in result.logprobs) == "certainly"
    assert {(token.logprob, token.top[0].logprob) for token in result.logprobs} == {(0.0, 0.0)}
    assert result.usage.completion_tokens == 2 * len(result.logprobs)
    assert backend.stats()["steps"] == 0
    freed(backend)


@pytest.mark.parametrize("words", [("certainly",), ("certainly", "by no means")])
def test_a_scored_prompt_changes_no_choice_and_is_told_with_the_first(
    opened: Opener, random_folder: Path, words: tuple[str, ...]
) -> None:
    backend = opened(random_folder, max_num_batched_tokens=16)
    form = Format("choice", choices=words)
    plain, scored = (
        ask("Say it.", n=3, max_tokens=20, **more).replace(response_format=form)
        for more in ({}, {"prompt_logprobs": 1})
    )
    expected, result = run(backend, plain, scored)
    assert told(result) == told(expected)
    assert result.prompt is not None
    assert len(result.prompt.logprobs) == result.usage.prompt_tokens
    freed(backend)


def test_a_thought_that_is_cut_off_at_once_waits_for_the_scores_of_its_prompt(
    opened: Opener, random_folder: Path
) -> None:
    backend = opened(random_folder, kind=Thinking)
    wanted = ask("Say it.", max_tokens=1, thinking_token_budget=0, prompt_logprobs=0)
    (result,) = run(backend, wanted)
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 1)
    assert result.prompt is not None
    assert len(result.prompt.logprobs) == result.usage.prompt_tokens
    freed(backend)


def test_a_call_takes_a_fifth_of_the_steps_and_is_the_same_call(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    asked = ask("Find it.", max_tokens=120).replace(tools=TOOLS, tool_choice="find_product", parallel_tool_calls=False)
    (result,) = run(forcing(backend, True), asked)
    steps = backend.stats()["steps"]
    (plain,) = run(forcing(backend, False), asked)
    assert backend.stats()["steps"] - steps > 5 * steps
    assert result.finish_reason == plain.finish_reason == "tool_calls"
    assert result.tool_calls[0].arguments == plain.tool_calls[0].arguments
    assert json.loads(result.tool_calls[0].arguments)["n"] in (1, 2)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 11, 30])
def test_max_tokens_and_stops_cut_a_forced_text_as_any_other(tiny: LocalBackend, limit: int) -> None:
    text = "Zurich, Quito, Xanthi, Jena and Wroclaw are towns"
    form = Format("regex", pattern=f"(Yes|No): {text}")
    cut, stopped, token = run(
        tiny,
        ask("x", max_tokens=limit, logprobs=0).replace(response_format=form),
        ask("x", max_tokens=200, logprobs=0, stop=("Xanthi",)).replace(response_format=form),
        ask("x", max_tokens=200, stop_token_ids=(tiny._loaded.checkpoint.tokenizer.encode(",")[0],)).replace(  # type: ignore[union-attr]
            response_format=form
        ),
    )
    assert cut.finish_reason == "length"
    assert cut.usage.completion_tokens == limit == len(cut.logprobs or ())
    assert f"Yes: {text}".startswith(cut.text) or f"No: {text}".startswith(cut.text)
    assert stopped.text in ("Yes: Zurich, Quito, ", "No: Zurich, Quito, ")
    assert "".join(token.token for token in stopped.logprobs or ()) == stopped.text
    assert (stopped.finish_reason, token.finish_reason) == ("stop", "stop")
    assert token.text in ("Yes: Zurich", "No: Zurich")


def test_a_stream_brings_each_step_as_one_piece_and_nothing_before_the_first(
    opened: Opener, random_folder: Path
) -> None:
    backend = opened(random_folder)

    async def collect() -> list[Any]:
        return [chunk async for chunk in backend.stream(guided(1, logprobs=0))]

    chunks = asyncio.run(collect())
    assert "".join(chunk.text for chunk in chunks) == run(backend, guided(1, logprobs=0))[0].text
    assert chunks[0].text.startswith('{"category": "')
    assert len(chunks[0].logprobs) > 5
    assert len(chunks) <= backend.stats()["steps"]
    last = chunks[-1]
    assert sum(len(chunk.logprobs) for chunk in chunks) == last.usage.completion_tokens
    assert 0 < last.timing.first_token < last.timing.total


class Thinking(Intercepted):
    """The prompt has opened the thoughts, and the model thinks "hm" and ends them."""

    def _runner(self, *arguments: Any) -> Runner:
        script = arguments[0].tokenizer.encode("hm</think>", add_special_tokens=False)

        class Ends(Runner):
            def forward(self, step: Step) -> Any:
                sequences, logits = super().forward(step)
                for row, sequence in enumerate(sequences):
                    if sequence.num_output < len(script):
                        logits[row, script[sequence.num_output]] += 1e4
                return sequences, logits

        return Ends(*arguments)

    def arrives(self, request: EngineRequest) -> None:
        for output in request.outputs:
            output.reasoning = True
            output.__post_init__()


def test_thoughts_are_free_and_the_form_begins_behind_them(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder, kind=Thinking)
    (result,) = run(backend, guided(0))
    assert result.reasoning == "hm"
    assert list(json.loads(result.text)) == list(SCHEMA["properties"])  # type: ignore[call-overload]
    assert backend.stats()["forced_tokens"] > 5


def test_forced_tokens_are_part_of_the_identity() -> None:
    identity = LocalBackend(device="cpu", dtype="float32").peek_identity()
    assert identity is not None
    assert identity["forced_tokens"] is True
