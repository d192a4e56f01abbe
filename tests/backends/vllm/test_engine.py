"""What the vLLM backend promises beside the contract, on one engine that the last test kills."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest

from qvl import media
from qvl.backends.vllm.backend import VllmBackend
from qvl.errors import ConfigError, EngineDeadError, UnsupportedInputError
from qvl.testing.asking import ask, collect, drain, square
from qvl.tiny import render
from qvl.types import ResponseFormat
from tests.backends.token_engines import (
    QUESTIONS,
    Loop,
    analyses_that_differ,
    both,
    check_form,
    check_logprobs,
    guided,
    start_and_leave,
)
from tests.backends.vllm.conftest import LIMIT, SETTINGS


def generated(name: str) -> float:
    """The sum of a counter of vLLM's own metrics, over the engines of this process."""
    from prometheus_client import REGISTRY

    return sum(sample.value for family in REGISTRY.collect() for sample in family.samples if sample.name == name)


# Arguments, which vLLM itself reads


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_length": 5}, "unknown vLLM engine argument 'max_model_length' (did you mean 'max_model_len'"),
        ({"max_model_len": "many"}, "--max-model-len"),
        ({"dtype": "float33"}, "float33"),
        ({"max_model_len": 10**9}, "max_model_len"),
        ({"kv_cache_dtype": "fp99"}, "fp99"),
    ],
)
def test_an_argument_that_vllm_refuses_is_an_error_of_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(VllmBackend(**{**SETTINGS, **options}).open())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strings_are_read_as_on_the_command_line_of_vllm() -> None:
    from qvl.backends.vllm import engine as vllm_engine

    _, kind = vllm_engine.import_vllm()
    read = vllm_engine.read_engine_args(kind, {"model": "x", "max_model_len": "2k", "enforce_eager": True})
    assert (read.max_model_len, read.enforce_eager) == (2000, True)


# The same answers as the local backend, by the same Pipeline


def test_greedy_analyses_equal_those_of_the_local_backend(
    engine: VllmBackend, loop: Loop, record_property: Callable[[str, object], None]
) -> None:
    different = analyses_that_differ(loop, engine)
    record_property("analyses equal to those of the local backend", f"{100 - len(different)} of 100")
    assert len(different) <= 1, different


def test_greedy_answers_equal_those_of_the_local_backend(engine: VllmBackend, loop: Loop) -> None:
    pictures = [media.load(render.sample(seed)[1]) for seed in range(6000, 6032)]
    requests = [ask(QUESTIONS[n % 4], picture, max_tokens=48) for n, picture in enumerate(pictures)]
    ours, its = both(loop, engine, requests)
    different = [(a.text, b.text) for a, b in zip(ours, its, strict=True) if a.text != b.text]
    assert len(different) <= 1, different


# What the engine is told


@guided
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_vllm_itself_guides_the_output(
    engine: VllmBackend, loop: Loop, form: ResponseFormat, fits: str, temperature: float
) -> None:
    request = ask("Say something.", square(), max_tokens=60, temperature=temperature, seed=4, n=4)
    check_form(loop, engine, request.replace(response_format=form), fits)


def test_logprobs_are_those_of_the_local_backend(engine: VllmBackend, loop: Loop) -> None:
    check_logprobs(loop, engine, 3)


def test_more_pictures_than_the_limit_are_refused_and_as_many_are_seen(engine: VllmBackend, loop: Loop) -> None:
    assert engine.capabilities.images == LIMIT
    pictures = [media.load(render.sample(seed, (64, 64))[1]) for seed in range(LIMIT + 1)]
    with pytest.raises(UnsupportedInputError, match="at most 3"):
        loop.run_until_complete(engine.generate(ask("What brand is the second?", *pictures)))
    answered = loop.run_until_complete(engine.generate(ask("What brand is the second?", *pictures[:LIMIT])))
    alone = loop.run_until_complete(engine.generate(ask("What brand is the second?", pictures[0])))
    assert answered.usage.image_tokens == LIMIT * alone.usage.image_tokens


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (900, 120), (40, 40)])
def test_pictures_have_the_size_that_our_own_rules_give_them(
    engine: VllmBackend, loop: Loop, size: tuple[int, int]
) -> None:
    picture = media.load(render.sample(5002, size)[1])
    request = ask("Describe the product.", picture, max_tokens=20).replace(max_pixels=96 * 96)
    (ours,), (its,) = both(loop, engine, [request])
    assert (its.usage.image_tokens, its.text) == (ours.usage.image_tokens, ours.text)


def test_closing_streams_aborts_them_in_the_engine(engine: VllmBackend, loop: Loop) -> None:
    """vLLM makes no more of an answer once nobody reads it."""
    before = generated("vllm:generation_tokens_total")
    loop.run_until_complete(start_and_leave(engine))
    assert not engine._loaded.engine.output_processor.has_unfinished_requests()
    settled = loop.run_until_complete(engine.generate(ask("What colour is it?", square(), max_tokens=300)))
    made = generated("vllm:generation_tokens_total") - before
    assert 0 < made < 8 * 750 + settled.usage.completion_tokens


# The end: this test leaves a dead engine behind


def test_a_killed_engine_is_told_apart_at_once_and_by_readiness(engine: VllmBackend, loop: Loop) -> None:
    async def die() -> list[Any]:
        waiting = [engine.stream(ask("Count.", max_tokens=1500, ignore_eos=True)) for _ in range(3)]
        for stream in waiting:
            await anext(stream)
        assert engine.unready() is None
        (core,) = [child for child in multiprocessing.active_children() if "EngineCore" in child.name]
        core.kill()
        return await asyncio.gather(*(drain(stream) for stream in waiting), return_exceptions=True)

    for outcome in loop.run_until_complete(asyncio.wait_for(die(), 60)):
        assert isinstance(outcome, EngineDeadError)
        assert "\n" not in str(outcome)
    assert engine.unready() == "the engine is dead"
    with pytest.raises(EngineDeadError, match="vLLM's engine is dead"):
        loop.run_until_complete(collect(engine, ask("What colour is it?")))
    assert engine.stats()["num_running"] == 0
