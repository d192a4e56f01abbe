"""Greedy answers equal transformers.generate token for token in float32, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from qvl.types import Result
from tests.backends.local.checkpoints import random_mixture
from tests.backends.local.reference import Reference, clear
from tests.backends.local.requests import ask

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qvl.backends.local.backend import LocalBackend
    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener


def answer_all(backend: LocalBackend, wanted: Iterable[ChatRequest], seed: int = 0) -> list[Result]:
    """All at once, in shuffled order, joining while others run."""

    async def one(request: ChatRequest, delay: float) -> Result:
        await asyncio.sleep(delay)
        return await backend.generate(request)

    async def run() -> list[Result]:
        dice = random.Random(seed)
        requests = list(wanted)
        order = list(range(len(requests)))
        dice.shuffle(order)
        tasks = {index: asyncio.create_task(one(requests[index], dice.random() * 2)) for index in order}
        return [await tasks[index] for index in range(len(requests))]

    return asyncio.run(run())


Answered = tuple[list["ChatRequest"], list[list[int]]]


@pytest.fixture(scope="session")
def bundled_300(bundled_reference: Reference, mixed_300: list[ChatRequest]) -> Answered:
    return clear(mixed_300, bundled_reference.generate)


@pytest.fixture(scope="session")
def random_100(random_reference: Reference, mixed_300: list[ChatRequest]) -> Answered:
    return clear(mixed_300[:100], random_reference.generate)


CACHES = [pytest.param(True, id="caches"), pytest.param(False, id="no-caches")]


def check(reference: Reference, results: list[Result], expected: list[list[int]]) -> None:
    texts = [reference.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [result.text for result in results] == texts
    assert [result.usage.completion_tokens for result in results] == [len(ids) for ids in expected]


def test_60_mixed_requests_on_the_bundled_model(
    opened: Opener, bundled_reference: Reference, mixed_300: list[ChatRequest]
) -> None:
    backend = opened(max_num_seqs=24, max_num_batched_tokens=160, speculate="on")
    wanted, expected = clear(mixed_300[:60], bundled_reference.generate)
    check(bundled_reference, answer_all(backend, wanted), expected)
    assert backend.stats()["prefix_hit_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("caches", CACHES)
def test_300_mixed_requests_on_the_bundled_model(
    opened: Opener, bundled_reference: Reference, bundled_300: Answered, caches: bool
) -> None:
    settings = {"speculate": "on"} if caches else {"speculate": "off", "prefix_cache": False, "vision_cache_bytes": 0}
    backend = opened(max_num_seqs=24, max_num_batched_tokens=160, **settings)
    wanted, expected = bundled_300
    check(bundled_reference, answer_all(backend, wanted), expected)
    assert bool(backend.stats()["prefix_hit_tokens"]) is caches
    assert bool(backend.stats()["vision_cache_bytes"]) is caches


@pytest.mark.slow
@pytest.mark.parametrize("caches", CACHES)
def test_100_mixed_requests_on_a_random_model(
    opened: Opener, random_folder: object, random_reference: Reference, random_100: Answered, caches: bool
) -> None:
    settings = {"speculate": "on"} if caches else {"speculate": "off", "prefix_cache": False, "vision_cache_bytes": 0}
    backend = opened(random_folder, max_num_seqs=24, max_num_batched_tokens=160, **settings)
    wanted, expected = random_100
    check(random_reference, answer_all(backend, wanted), expected)


@pytest.mark.slow
def test_a_mixture_of_experts(opened: Opener, tmp_path: Path, mixed_300: list[ChatRequest]) -> None:
    folder = random_mixture(tmp_path / "mixture")
    reference = Reference(folder)
    backend = opened(folder, max_num_seqs=8, max_num_batched_tokens=160)
    wanted, expected = clear(mixed_300[:16], reference.generate)
    check(reference, answer_all(backend, wanted), expected)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_300_on_a_random_model(
    opened: Opener, random_folder: object, random_reference: Reference, mixed_300: list[ChatRequest]
) -> None:
    backend = opened(random_folder, max_num_seqs=24, max_num_batched_tokens=160)
    wanted, expected = clear(mixed_300, random_reference.generate)
    check(random_reference, answer_all(backend, wanted), expected)


@pytest.mark.slow
def test_a_memory_so_small_that_sequences_are_preempted_changes_no_answer(
    opened: Opener, random_folder: object, random_reference: Reference
) -> None:
    # Memory for three rows of 256 or one of 512: as answers grow, the younger ones must give way and come back.
    backend = opened(random_folder, kv_cache_bytes=780 * 768, max_model_len=512, prefix_cache=False)
    asked = [ask(place, "Say hello. " * 10, max_tokens=150 + 10 * place) for place in range(10)]
    wanted, expected = clear(asked, random_reference.generate)
    check(random_reference, answer_all(backend, wanted), expected)
    assert backend.stats()["num_preemptions"] > 0
