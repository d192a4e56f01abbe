"""Decisions by vLLM are those of the local backend, and leave the logprobs of others alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from qvl import media
from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.backends.vllm.backend import VllmBackend
from qvl.decisions import Choice, Decision, Predicate, Score
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.testing.asking import ask
from qvl.tiny import render
from tests.backends.token_engines import Loop

QUESTIONS = (
    Choice("What colour is it?", ["red", "blue", "green", "yellow", "black", "white", "dark red"]),
    Choice("What is it?", ["mug", "bottle", "shoe", "bag", "chair", {"value": "lamp", "description": "gives light"}]),
    Choice("How many are there?", ["1", "2", "3", "10"]),
    Predicate("Is it red?"),
    Score("How well can it be seen?", ["badly", "fairly", "well"]),
)
PICTURES = 20


async def _decisions(backend: Backend) -> list[Decision]:
    pipeline = AsyncPipeline(backend=backend, cache="off")
    pictures = [media.load(render.sample(seed)[1]) for seed in range(7000, 7000 + PICTURES)]
    told = await asyncio.gather(*(pipeline.decide(picture, QUESTIONS) for picture in pictures))
    return [answer for answers in told for answer in answers]


def _furthest(pairs: Sequence[tuple[Decision, Decision]]) -> float:
    return max(
        abs(share - (other.probabilities or {})[value])
        for one, other in pairs
        for value, share in (one.probabilities or {}).items()
    )


@pytest.mark.timeout(1800)
def test_they_agree_with_the_local_backend(
    engine: VllmBackend, loop: Loop, record_property: Callable[[str, object], None]
) -> None:
    async def local() -> list[Decision]:
        async with LocalBackend(dtype="float32", device="cpu", kv_cache_bytes=64 << 20) as backend:
            return await _decisions(backend)

    ours, its = loop.run_until_complete(local()), loop.run_until_complete(_decisions(engine))
    pairs = list(zip(ours, its, strict=True))
    assert {(one.method, other.method) for one, other in pairs} == {("logits", "logits")}
    same = sum(one.value == other.value for one, other in pairs)
    furthest = _furthest(pairs)
    record_property("decisions equal to those of the local backend", f"{same} of {len(pairs)}")
    record_property("furthest probability of the local backend's", f"{furthest:.2g}")
    print(f"decisions: {same} of {len(pairs)} alike, furthest probability {furthest:.2g}")
    assert same >= 0.99 * len(pairs)
    assert furthest <= 0.02


def test_they_leave_the_logprobs_of_others_alone(engine: VllmBackend, loop: Loop) -> None:
    """At the same time, which vLLM's own sampler would not."""
    picture = media.load(render.sample(7100)[1])
    request = ask("Describe the product.", picture, max_tokens=24, logprobs=3)

    async def together() -> tuple[list[object], object]:
        pipeline = AsyncPipeline(backend=engine, cache="off")
        chats = asyncio.gather(*(engine.generate(request) for _ in range(6)))
        answer = await pipeline.decide(picture, QUESTIONS[0])
        return list(await chats), answer[0].probabilities

    alone = loop.run_until_complete(engine.generate(request))
    asked = loop.run_until_complete(AsyncPipeline(backend=engine, cache="off").decide(picture, QUESTIONS[0]))
    chats, shares = loop.run_until_complete(together())
    assert shares == pytest.approx(asked[0].probabilities, abs=1e-3)
    assert alone.logprobs is not None
    for chat in chats:
        told = chat.logprobs  # type: ignore[attr-defined]
        assert [note.token for note in told] == [note.token for note in alone.logprobs]
        for note, other in zip(told, alone.logprobs, strict=True):
            assert [top.token for top in note.top] == [top.token for top in other.top]
            assert [top.logprob for top in note.top] == pytest.approx([top.logprob for top in other.top], abs=2e-3)
