"""Qwen3.5 keeps states beside its keys: answers equal transformers', whatever is shared, dropped or begun anew."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_runner import Runner
from qvl.types import ChatRequest, Message, Result, SamplingParams, TextPart
from tests.backends.local.checkpoints import random_hybrid
from tests.backends.local.reference import Reference, clear
from tests.backends.local.requests import ask, mixed
from tests.backends.local.test_equals_generate import Answered, answer_all, check

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.backends.local.scheduling.step import Step
    from tests.backends.local.conftest import Opener

pytest.importorskip("transformers.models.qwen3_5", reason="this transformers does not know Qwen3.5")


@pytest.fixture(scope="module", params=["dense", pytest.param("mixture", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hybrid(tmp_path_factory.mktemp("random-qwen3-5"), mixture=request.param == "mixture")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def answered(reference: Reference) -> Answered:
    return clear(mixed(16, random.Random(11)), reference.generate)


SETTINGS: list[Any] = [
    pytest.param({}, id="default"),
    pytest.param({"prefix_cache": False, "vision_cache_bytes": 0}, id="no-caches"),
    pytest.param({"batch_invariant": True}, id="batch-invariant", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_mixed_requests_equal_generate(
    opened: Opener, folder: Path, reference: Reference, answered: Answered, settings: dict[str, Any]
) -> None:
    backend = opened(folder, max_num_seqs=12, max_num_batched_tokens=160, **settings)
    wanted, expected = answered
    check(reference, answer_all(backend, wanted), expected)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_many_mixed_requests_equal_generate(opened: Opener, folder: Path, reference: Reference) -> None:
    count = 60 if "moe" in type(reference.model).__name__.lower() else 300
    wanted, expected = clear(mixed(count, random.Random(12)), reference.generate)
    backend = opened(folder, max_num_seqs=24, max_num_batched_tokens=160)
    check(reference, answer_all(backend, wanted), expected)


class ForgetfulRunner(Runner):
    """A real runner that lacks memory in every fifth of 40 passes, once all of it is computed and written."""

    passes = 0

    def forward(self, step: Step) -> Any:
        result = super().forward(step)
        self.passes += 1
        if self.passes % 5 == 0 and self.passes <= 40:
            raise torch.OutOfMemoryError("out of memory")
        return result


class ForgetfulBackend(LocalBackend):
    def _runner(self, *given: Any) -> Runner:
        return ForgetfulRunner(*given)


def test_steps_that_are_computed_twice_and_sequences_that_begin_anew_change_no_answer(
    opened: Opener, folder: Path, reference: Reference, answered: Answered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvl.backends.local.out_of_memory.MEMORY_RETRIES", 1 << 20)
    backend = opened(folder, kind=ForgetfulBackend, max_num_seqs=12, max_num_batched_tokens=160)
    wanted, expected = answered
    check(reference, answer_all(backend, wanted), expected)
    assert backend.stats()["num_preemptions"] > 3


def chat(*turns: str, tokens: int = 12) -> ChatRequest:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[at % 2], (TextPart(text),)) for at, text in enumerate(turns))
    return ChatRequest(messages, SamplingParams(max_tokens=tokens))


def test_a_conversation_goes_on_from_the_state_behind_its_last_prompt(
    opened: Opener, folder: Path, reference: Reference
) -> None:
    backend = opened(folder)
    turns = ["Describe the mug at length. " * 20]
    for turn in range(3):
        request = chat(*turns)
        result = asyncio.run(backend.generate(request))
        check(reference, [result], [reference.generate(request)])
        cached = result.usage.cached_tokens or 0
        assert (cached > 100) is (turn > 0), cached
        turns += [result.text, f"And the handle? {turn}"]


@pytest.mark.slow
def test_a_prompt_that_many_begin_with_is_computed_once(opened: Opener, folder: Path, reference: Reference) -> None:
    backend = opened(folder)
    system = "You look at pictures of mugs and caps for a shop. " * 20
    requests = [chat(f"{system}\nQuestion {number}?") for number in range(8)]

    async def all_at_once() -> list[Result]:
        return list(await asyncio.gather(*map(backend.generate, requests[2:])))

    one_by_one = [asyncio.run(backend.generate(request)) for request in requests[:2]]
    together = asyncio.run(all_at_once())
    check(reference, [*one_by_one, *together], [reference.generate(request) for request in requests])
    # The second shows where prompts part, and those behind it begin there.
    assert all((result.usage.cached_tokens or 0) > 200 for result in together)


def test_choices_of_one_request_begin_with_one_prompt(opened: Opener, folder: Path, reference: Reference) -> None:
    backend = opened(folder)
    alone = chat("Describe the mug at length. " * 20)
    request = replace(alone, sampling=SamplingParams(max_tokens=12, n=3, temperature=0.0))
    result = asyncio.run(backend.generate(request))
    expected = reference.tokenizer.decode(reference.generate(alone), skip_special_tokens=True)
    assert [choice.text for choice in result.choices] == [expected] * 3


@pytest.mark.slow
def test_aborted_requests_leave_no_state_behind(opened: Opener, folder: Path, reference: Reference) -> None:
    backend = opened(folder, prefix_cache=False)

    async def some_leave() -> None:
        tasks = [asyncio.create_task(backend.generate(ask(f"Question {at}?", max_tokens=200))) for at in range(8)]
        await asyncio.sleep(0.3)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(some_leave())
    request = ask("What is it?", max_tokens=16)
    check(reference, [asyncio.run(backend.generate(request))], [reference.generate(request)])
    assert backend.stats()["kv_used_tokens"] == 0
