"""What the tests of vllm and openvino share: they hold an engine of others to the answers of the local backend."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from qvl import media
from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.testing.asking import ask, idle
from qvl.tiny import render
from qvl.types import ChatRequest, ResponseFormat

Loop = asyncio.AbstractEventLoop
LANGUAGES = ("en", "zh", "pt", "es")
QUESTIONS = ("What colour is it?", "What brand is it?", "Describe the product.", "品牌是什么?")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"shop": {"enum": ["Acme", "Zenith"]}, "price": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["shop", "price"],
    "additionalProperties": False,
}
FORMS = [
    (ResponseFormat("json_schema", schema=SCHEMA), r'\{"shop": "(Acme|Zenith)", "price": [1-9]\d\}'),
    (ResponseFormat("regex", pattern="[A-C]{3}-(x|y)[0-9]{4}"), "[A-C]{3}-(x|y)[0-9]{4}"),
    (ResponseFormat("choice", choices=('a "green" hat\n', "红 shoe")), '(?s)a "green" hat\n|红 shoe'),
]
guided = pytest.mark.parametrize(
    ("form", "fits"), FORMS, ids=lambda value: value.kind if isinstance(value, ResponseFormat) else ""
)


def mark(items: Sequence[pytest.Item], folder: Path, marker: str, modules: tuple[str, ...], reason: str) -> None:
    """Mark the tests of a folder, and skip them where the library is not installed."""
    absent = any(importlib.util.find_spec(module) is None for module in modules)
    for item in items:
        if folder in item.path.parents:
            item.add_marker(marker)
            item.add_marker(pytest.mark.timeout(600))
            if absent:
                item.add_marker(pytest.mark.skip(reason=reason))


def both(loop: Loop, engine: Backend, requests: Sequence[ChatRequest]) -> tuple[list[Any], list[Any]]:
    """The results of the local backend and of the engine, which are asked at once."""

    async def answers(backend: Backend) -> list[Any]:
        return list(await asyncio.gather(*map(backend.generate, requests)))

    async def local() -> list[Any]:
        async with _local() as backend:
            return await answers(backend)

    return loop.run_until_complete(local()), loop.run_until_complete(answers(engine))


def analyses_that_differ(loop: Loop, engine: Backend) -> list[tuple[str, str]]:
    """The texts (local, engine) that are not the same, of greedy analyses of 100 drawn pictures as an offline batch."""
    pictures = [media.load(render.sample(seed)[1]) for seed in range(5000, 5100)]

    async def analyses(backend: Backend) -> list[str]:
        pipeline = AsyncPipeline(backend=backend, cache="off", concurrency=16)
        texts = []
        for place, language in enumerate(LANGUAGES):
            async for item in pipeline.map(pictures[place::4], language=language):
                assert item.error is None, item.error
                assert item.result is not None
                texts.append(item.result.text)
        return texts

    async def local() -> list[str]:
        async with _local() as backend:
            return await analyses(backend)

    ours, its = loop.run_until_complete(local()), loop.run_until_complete(analyses(engine))
    assert len({*its}) > 50
    return [(a, b) for a, b in zip(ours, its, strict=True) if a != b]


def check_logprobs(loop: Loop, engine: Backend, alternatives: int) -> None:
    """Assert that the tokens of an answer and their log-probabilities are those of the local backend."""
    picture = media.load(render.sample(5001)[1])
    (ours,), (its,) = both(loop, engine, [ask("Describe the product.", picture, max_tokens=12, logprobs=alternatives)])
    assert [note.token for note in its.logprobs] == [note.token for note in ours.logprobs]
    for own, other in zip(ours.logprobs, its.logprobs, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=2e-3)
        assert [top.token for top in own.top][:1] == [top.token for top in other.top][:1]
        assert len(other.top) == alternatives


def check_form(loop: Loop, engine: Backend, request: ChatRequest, fits: str) -> list[str]:
    """Assert that every choice has its form and ends with it; return the texts."""
    choices = loop.run_until_complete(engine.generate(request)).choices
    for choice in choices:
        assert re.fullmatch(fits, choice.text), choice.text
        assert choice.finish_reason == "stop"
    return [choice.text for choice in choices]


async def start_and_leave(engine: Backend) -> None:
    """Begin eight answers of 1,500 tokens and close each behind its first chunk."""
    for _ in range(8):
        async with aclosing(engine.stream(ask("Count to a thousand.", max_tokens=1500, ignore_eos=True))) as chunks:
            await anext(chunks)
    await idle(engine)


def _local() -> LocalBackend:
    return LocalBackend(dtype="float32", device="cpu", kv_cache_bytes=64 << 20)
