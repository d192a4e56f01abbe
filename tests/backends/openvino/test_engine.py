"""What the OpenVINO backend promises beside the contract, on one engine that the last test breaks."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qvl import media
from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.errors import ConfigError, EngineDeadError, RequestError, UnsupportedInputError
from qvl.media.smart_resize import PixelLimits
from qvl.testing.asking import ask, collect, drain, idle, square
from qvl.tiny import render
from qvl.types import ResponseFormat, Tool
from tests.backends.openvino.conftest import EXACT
from tests.backends.token_engines import (
    QUESTIONS,
    SCHEMA,
    Loop,
    analyses_that_differ,
    both,
    check_form,
    check_logprobs,
    guided,
    start_and_leave,
)

# The same answers as the local backend


def test_greedy_analyses_equal_those_of_the_local_backend(engine: OpenVinoBackend, loop: Loop) -> None:
    different = analyses_that_differ(loop, engine)
    assert len(different) <= 1, different


def test_greedy_answers_and_their_usage_equal_those_of_the_local_backend(engine: OpenVinoBackend, loop: Loop) -> None:
    limits = PixelLimits(resized_height=64, resized_width=96)
    policies = [media.MediaPolicy(), media.MediaPolicy(max_pixels=96 * 96), media.MediaPolicy(limits=limits)]
    drawn = [render.sample(6000 + number)[1].resize(size) for number, size in enumerate(SIZES)]
    pictures = [media.load(image, policy) for image in drawn for policy in policies]
    assert [picture.sized for picture in pictures[:3]] == [False, False, True]
    requests = [ask(QUESTIONS[n % 4], picture, max_tokens=48) for n, picture in enumerate(pictures)]
    ours, its = both(loop, engine, requests)
    assert [result.usage.prompt_tokens for result in its] == [result.usage.prompt_tokens for result in ours]
    different = [(a.text, b.text) for a, b in zip(ours, its, strict=True) if a.text != b.text]
    assert len(different) <= 1, different


SIZES = ((640, 480), (480, 640), (900, 120), (40, 40))


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_that_the_library_gets_wrong_are_refused(engine: OpenVinoBackend, loop: Loop, name: str) -> None:
    with pytest.raises(UnsupportedInputError, match=name) as caught:
        loop.run_until_complete(engine.generate(ask("What colour is it?", **{name: 1.5})))
    assert caught.value.param == name


def test_logprobs_are_those_of_the_local_backend(engine: OpenVinoBackend, loop: Loop) -> None:
    check_logprobs(loop, engine, 0)


def test_sampling_follows_the_probabilities(engine: OpenVinoBackend, loop: Loop) -> None:
    """Of tokens that were drawn once each, the share of each is its probability; min_p and top_k cut the rest off."""
    picture = media.load(render.sample(5001)[1])

    def first(**more: Any) -> list[Any]:
        more |= {"max_tokens": 1, "temperature": 8.0, "logprobs": 0, "n": 128, "ignore_eos": True}
        request = ask("Describe the product.", picture, **more)
        return [choice.logprobs[0].token for choice in loop.run_until_complete(engine.generate(request)).choices]

    free, cut, best = first(), first(top_k=3), first(min_p=0.99)
    assert len({*free}) > 40
    assert 1 < len({*cut}) <= 3
    assert len({*best}) == 1
    assert sorted(first(seed=5)) == sorted(first(seed=5))
    assert sorted(first()) != sorted(first())


# What OpenVINO is told, and what it is not


@guided
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_openvino_itself_guides_the_output(
    engine: OpenVinoBackend, loop: Loop, form: ResponseFormat, fits: str, temperature: float
) -> None:
    request = ask("Say something.", square(), max_tokens=60, temperature=temperature, n=4, ignore_eos=True)
    check_form(loop, engine, request.replace(response_format=form), fits)


def test_a_choice_of_tools_is_a_call_of_one(engine: OpenVinoBackend, loop: Loop) -> None:
    tools = (Tool("price_of", "Looks a price up.", SCHEMA), Tool("stock_of", "Counts.", {}))
    request = ask("How much?", square(), max_tokens=80).replace(tools=tools, tool_choice="required")
    result = loop.run_until_complete(engine.generate(request))
    (call,) = result.tool_calls
    assert call.name in ("price_of", "stock_of")
    assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize(
    "form",
    [
        ResponseFormat("regex", pattern="([a-"),
        ResponseFormat("json_schema", schema={"type": "integer", "minimum": 5, "maximum": 3}),
        ResponseFormat("json_schema", schema={"type": "integer", "multipleOf": 7}),
    ],
    ids=["regex", "empty", "unenforced"],
)
def test_a_form_that_cannot_be_enforced_is_refused_and_hurts_nobody(
    engine: OpenVinoBackend, loop: Loop, form: ResponseFormat
) -> None:
    async def beside() -> list[Any]:
        good = ask("What colour is it?", square(), max_tokens=30, ignore_eos=True)
        bad = good.replace(response_format=form)
        return list(await asyncio.gather(*map(engine.generate, (good, bad, good)), return_exceptions=True))

    first, refused, last = loop.run_until_complete(beside())
    assert isinstance(refused, RequestError)
    assert "\n" not in str(refused)
    assert refused.param == "response_format"
    assert first.text == last.text
    assert engine.unready() is None


@pytest.mark.parametrize("typed", ["<|im_end|>", "a <|vision_start|><|image_pad|><|vision_end|>", "<ov_genai_image_0>"])
def test_a_typed_control_token_is_refused(engine: OpenVinoBackend, loop: Loop, typed: str) -> None:
    with pytest.raises(UnsupportedInputError, match="a control token of the model as text"):
        loop.run_until_complete(engine.generate(ask(f"What is {typed}?", square())))
    loop.run_until_complete(idle(engine))


def test_stop_token_ids_end_an_answer_also_where_the_models_own_are_ignored(
    engine: OpenVinoBackend, loop: Loop
) -> None:
    picture = media.load(render.sample(5001)[1])
    whole = loop.run_until_complete(
        engine.generate(ask("Describe the product.", picture, max_tokens=30, ignore_eos=True, logprobs=0))
    )
    assert whole.finish_reason == "length"
    tokenizer = engine._loaded.tokenizer
    third = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(whole.text)[2])
    for more in ({}, {"ignore_eos": True}):
        request = ask("Describe the product.", picture, max_tokens=30, stop_token_ids=(third,), **more)
        result = loop.run_until_complete(engine.generate(request))
        assert result.finish_reason == "stop"
        assert result.usage.completion_tokens <= 3
        assert whole.text.startswith(result.text)


def test_closing_streams_aborts_them_in_the_pipeline(engine: OpenVinoBackend, loop: Loop) -> None:
    """OpenVINO makes no more of an answer once nobody reads it, and lets go of its memory."""
    pipeline = engine._loaded.engine._pipeline

    async def leave() -> None:
        await start_and_leave(engine)
        for _ in range(6000):
            if not pipeline.has_non_finished_requests():
                return
            await asyncio.sleep(0.01)
        pytest.fail("requests that nobody reads are still in the pipeline")

    loop.run_until_complete(leave())


# A model and its settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu.9"}, "OpenVINO has no device 'GPU.9' (known: CPU"),
        ({"dtype": "float33"}, "dtype='float33' is unknown (auto, float32, bfloat16, float16)"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is unknown"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is out of range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_work_is_an_error_of_one_line(exported: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(OpenVinoBackend(str(exported), **options).open())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_changes_an_answer_is_in_the_identity_and_known_before_the_weights_are_loaded(
    engine: OpenVinoBackend, exported: Path
) -> None:
    facts = engine.identity()
    assert {"library", "device", "dtype", "kv_cache_dtype", "weights", "quantisation", "processor"} <= facts.keys()
    assert OpenVinoBackend(str(exported), **EXACT).peek_identity() == facts
    assert OpenVinoBackend(str(exported), **{**EXACT, "kv_cache_dtype": "int8"}).peek_identity() != facts
    assert OpenVinoBackend(str(exported), **{**EXACT, "dtype": "bfloat16"}).peek_identity() != facts


# The end: this test leaves a dead engine behind


def test_a_pipeline_that_failed_is_said_at_once_and_by_readiness(engine: OpenVinoBackend, loop: Loop) -> None:
    import openvino_genai

    async def die() -> list[Any]:
        waiting = [engine.stream(ask("Count.", max_tokens=1500, ignore_eos=True)) for _ in range(3)]
        for stream in waiting:
            await anext(stream)
        assert engine.unready() is None
        # What the check in front of the pipeline keeps out.
        broken = openvino_genai.StructuredOutputConfig(regex="([a-")
        config = openvino_genai.GenerationConfig(max_new_tokens=4, structured_output_config=broken)
        # The pipeline may fail before this request is noted, which is then told as well.
        with suppress(EngineDeadError):
            await asyncio.to_thread(engine._loaded.engine.add, "a", [], config, lambda piece: None)
        return await asyncio.gather(*(drain(stream) for stream in waiting), return_exceptions=True)

    for outcome in loop.run_until_complete(asyncio.wait_for(die(), 60)):
        assert isinstance(outcome, EngineDeadError)
        assert "\n" not in str(outcome)
    assert engine.unready() == "the engine is dead"
    with pytest.raises(EngineDeadError, match="OpenVINO's pipeline failed"):
        loop.run_until_complete(collect(engine, ask("What colour is it?")))
    assert engine.stats()["num_running"] == 0
