"""What goes wrong stays where it belongs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_runner import Runner
from qvl.errors import BackendError, BackendUnavailableError, DeviceMemoryError, EngineDeadError, RequestError
from qvl.types import ResponseFormat, Result
from tests.backends.local.intercepted import Intercepted
from tests.backends.local.requests import ask, freed, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.backends.local.engine_request import EngineRequest
    from qvl.backends.local.scheduling.step import Step
    from qvl.backends.local.text.processor import PreparedPicture
    from tests.backends.local.conftest import Opener


class FaultyRunner(Runner):
    """A real runner that fails on cue: prompts longer than `too_long`, pictures of `bad_key`, growing KV."""

    too_long: int = 1 << 30
    bad_key: str | None = None
    dies: bool = False
    fails_to_grow: int = 0
    hold: threading.Event | None = None

    def forward(self, step: Step) -> Any:
        if self.hold is not None:
            self.hold.wait(20)
        if self.dies:
            raise RuntimeError("the device fell off the bus")
        if any(chunk.sequence.num_prompt > self.too_long for chunk in step.prefill):
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(step)

    def encode(self, pictures: Sequence[PreparedPicture], units: float, grain: float) -> float:
        if any(picture.key == self.bad_key for picture in pictures):
            raise RuntimeError("shape mismatch")
        return super().encode(pictures, units, grain)

    def apply(self, ops: Any) -> None:
        if ops and self.fails_to_grow:
            self.fails_to_grow -= 1
            raise torch.OutOfMemoryError("out of memory")
        super().apply(ops)


class FaultyBackend(LocalBackend):
    runner: FaultyRunner

    def _runner(self, *given: Any) -> Runner:
        self.runner = FaultyRunner(*given)
        return self.runner


@pytest.fixture
def faulty(opened: Opener) -> FaultyBackend:
    backend = opened(kind=FaultyBackend, watchdog_s=0.3)
    assert isinstance(backend, FaultyBackend)
    return backend


def settle(backend: LocalBackend, *requests: Any) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(backend.generate(one) for one in requests), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_out_of_memory_ends_the_request_that_caused_it_and_no_other(faulty: FaultyBackend) -> None:
    faulty.runner.too_long = 200
    small, large, other = settle(faulty, ask(0, "x", max_tokens=30), ask("hello " * 300), ask(1, "y", max_tokens=30))
    assert isinstance(large, DeviceMemoryError)
    assert isinstance(small, Result)
    assert isinstance(other, Result)
    assert faulty.stats()["memory_errors"] >= 1
    freed(faulty)
    assert faulty.unready() is None


def test_out_of_memory_while_kv_grows_changes_no_answer(tiny: LocalBackend, faulty: FaultyBackend) -> None:
    wanted = [ask(place, "What brand is it?", max_tokens=12) for place in range(4)]
    expected = [result.text for result in run(tiny, *wanted)]
    faulty.runner.fails_to_grow = 2
    assert [result.text for result in run(faulty, *wanted)] == expected
    assert faulty.stats()["memory_errors"] == 2
    freed(faulty)


def test_a_picture_that_fails_ends_its_own_request(faulty: FaultyBackend) -> None:
    loaded = faulty._loaded
    assert loaded is not None
    faulty.runner.bad_key = loaded.processor.prepare(ask(3, "x")).pictures[0].key
    bad, good = settle(faulty, ask(3, "What brand is it?"), ask(4, "What brand is it?"))
    assert isinstance(bad, BackendError)
    assert "picture" in str(bad)
    assert isinstance(good, Result)
    freed(faulty)


class Refusing:
    """A grammar that accepts some tokens and then none."""

    def __init__(self, matcher: Any, patience: int) -> None:
        self._matcher = matcher
        self._left = patience

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def consume_token(self, token: int) -> bool:
        self._left -= 1
        return self._left >= 0

    def get_error(self) -> str:
        return "lexer too complex"


class GrammarFails(Intercepted):
    """The grammar of requests whose id is "fails" breaks down while they run: the mask cannot be made of it."""

    def arrives(self, request: EngineRequest) -> None:
        if request.request_id == "fails":
            request.sequences[0].matcher = Refusing(request.sequences[0].matcher, 2)  # type: ignore[assignment]


def test_a_grammar_that_fails_while_it_runs_ends_its_own_request(opened: Opener) -> None:
    backend = opened(kind=GrammarFails)
    form = ResponseFormat("regex", pattern="[a-z]{40}")
    guided = ask("x", max_tokens=60).replace(response_format=form)
    bad, good, free = settle(backend, guided.replace(request_id="fails"), guided, ask("y", max_tokens=30))
    assert isinstance(bad, RequestError)
    assert "too complex to be enforced" in str(bad)
    assert len(good.text) == 40
    assert isinstance(free, Result)


def test_a_grammar_that_gives_up_is_no_end_of_an_answer(opened: Opener) -> None:
    backend = opened()
    form = ResponseFormat("regex", pattern="((a{1,100}){1,100}){60,100}b")
    hard, free = settle(backend, ask("x", max_tokens=60).replace(response_format=form), ask("y", max_tokens=8))
    assert isinstance(hard, RequestError)
    assert "too complex to be enforced" in str(hard)
    assert isinstance(free, Result)
    freed(backend)
    assert backend.unready() is None


@pytest.mark.parametrize("token", [10**7, 1 << 70, -1])
def test_a_stop_token_that_is_not_in_the_vocabulary_ends_nothing_and_nobody(opened: Opener, token: int) -> None:
    backend = opened()
    odd, same = settle(
        backend, ask("x", max_tokens=4, min_tokens=2, stop_token_ids=(token,)), ask("x", max_tokens=4, min_tokens=2)
    )
    assert odd.text == same.text
    assert backend.unready() is None


def test_a_bad_word_that_no_text_can_hold_is_refused(opened: Opener) -> None:
    (refused,) = settle(opened(), ask("x", bad_words=("\ud800",)))
    assert isinstance(refused, RequestError)
    assert refused.param == "bad_words"


def test_a_dead_loop_reaches_every_waiter_and_readiness(faulty: FaultyBackend) -> None:
    faulty.runner.dies = True
    results = settle(faulty, *(ask(place, "x", max_tokens=50) for place in range(5)))
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert "fell off the bus" in str(faulty.unready())
    assert isinstance(settle(faulty, ask("x"))[0], EngineDeadError)


def test_the_watchdog_tells_when_no_token_comes(faulty: FaultyBackend) -> None:
    faulty.runner.hold = threading.Event()

    async def watch() -> str | None:
        task = asyncio.create_task(faulty.generate(ask("x")))
        reason = None
        deadline = time.monotonic() + 15
        while reason is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            reason = faulty.unready()
        assert faulty.runner.hold is not None
        faulty.runner.hold.set()
        await task
        return reason

    assert "no token for" in str(asyncio.run(watch()))
    assert faulty.unready() is None


def test_closing_ends_promptly_with_work_in_flight(opened: Opener) -> None:
    backend = opened()

    async def close_in_the_middle() -> list[Any]:
        tasks = [
            asyncio.create_task(backend.generate(ask(place, "x", max_tokens=4000, ignore_eos=True)))
            for place in range(4)
        ]
        while not backend.stats()["num_running"]:
            await asyncio.sleep(0.01)
        await backend.aclose()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(close_in_the_middle())
    assert all(isinstance(result, BackendUnavailableError) for result in results)
    assert backend.unready() == "closed"
    assert isinstance(settle(backend, ask("x"))[0], BackendUnavailableError)
