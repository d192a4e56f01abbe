from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.base import Backend
from qvl.backends.replay import RecordBackend, ReplayBackend
from qvl.chunks import fold
from qvl.errors import BackendResponseError, ConfigError, RateLimitError
from qvl.testing import EchoBackend, RecordingBackend
from qvl.testing.asking import ask, collect, square
from tests.backends.test_contract import PAUSE, SeeingContract, coloured

pytestmark = pytest.mark.anyio


def record_contract(path: Path) -> None:
    """Runs the whole contract over a recorded backend, then asks to the end what the contract broke off."""
    passed_through: list[RecordingBackend] = []

    def make() -> Backend:
        passed_through.append(RecordingBackend(EchoBackend(pause=PAUSE)))
        return RecordBackend(passed_through[-1], path)

    suite = SeeingContract()
    loop = SeeingContract.loop = asyncio.new_event_loop()
    backend = make()
    loop.run_until_complete(backend.open())
    given: dict[str, Any] = {
        "backend": backend,
        "make_backend": make,
        "question": "Describe what is sold here, in a few words.",
        "long_question": "Count: " + " ".join(f"number-{n}" for n in range(40)),
        "sight": coloured(),
    }
    for name, test in inspect.getmembers(SeeingContract, inspect.isfunction):
        if name.startswith("test_"):
            wanted = inspect.signature(test).parameters
            test(suite, **{name: value for name, value in given.items() if name in wanted})
    asked = [request for one in passed_through for request in one.requests if request.sampling.max_tokens == 400]
    assert asked
    loop.run_until_complete(backend.generate(asked[0]))
    loop.run_until_complete(backend.aclose())
    loop.close()


class TestReplayHoldsTheContractItWasRecordedWith(SeeingContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Backend]:
        path = tmp_path_factory.mktemp("replay") / "contract.jsonl"
        record_contract(path)
        return lambda: ReplayBackend(path)


async def test_an_answer_is_replayed_with_everything_but_its_time(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    request = ask("what is it?", square(), logprobs=1, n=2)
    async with RecordBackend(EchoBackend(), path) as backend:
        recorded = await collect(backend, request)
    async with ReplayBackend(path) as backend:
        replayed = await collect(backend, request)
    assert fold(replayed, want_logprobs=True)[:2] == fold(recorded, want_logprobs=True)[:2]


async def test_a_recording_holds_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    picture = square()
    async with RecordBackend(EchoBackend(), path) as backend:
        await backend.generate(ask("what is it?", picture))
    text = path.read_text()
    assert picture.sha256 in text
    assert picture.data_url()[30:60] not in text
    assert all(json.loads(line) for line in text.splitlines())


async def test_an_unrecorded_request_names_the_nearest_one_and_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    async with RecordBackend(EchoBackend(), path) as backend:
        await backend.generate(ask("how many shoes are there?", max_tokens=7))
        await backend.generate(ask("sing a song"))
    async with ReplayBackend(path) as backend:
        with pytest.raises(BackendResponseError) as caught:
            await backend.generate(ask("how many shoes are there?", max_tokens=8))
    said = str(caught.value)
    assert caught.value.code == "not_recorded"
    assert "how many shoes" in said
    assert "sampling.max_tokens: recorded 7, asked 8" in said


async def test_several_answers_to_one_request_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    request = ask("one two three four five six seven eight nine ten", temperature=1.0)
    async with RecordBackend(EchoBackend(), path) as backend:
        recorded = [(await backend.generate(request)).text for _ in range(3)]
    assert len(set(recorded)) > 1
    async with ReplayBackend(path) as backend:
        replayed = [(await backend.generate(request)).text for _ in range(4)]
    assert replayed == [*recorded, recorded[-1]]


async def test_errors_are_replayed_as_themselves(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    backend: Backend = RecordBackend(EchoBackend(fail=RateLimitError("full", hint="come back")), path)
    async with backend:
        with pytest.raises(RateLimitError):
            await backend.generate(ask("hello"))
    async with ReplayBackend(path) as backend:
        with pytest.raises(RateLimitError, match="full"):
            await backend.generate(ask("hello"))


async def test_an_answer_broken_off_by_the_caller_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    async with RecordBackend(EchoBackend(), path) as backend:
        stream = backend.stream(ask("one two three"))
        await anext(stream)
        await stream.aclose()
    assert len(path.read_text().splitlines()) == 1


async def test_a_recording_of_another_backend_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    async with RecordBackend(EchoBackend("one"), path):
        pass
    with pytest.raises(ConfigError, match="another backend"):
        await RecordBackend(EchoBackend("two"), path).open()


@pytest.mark.parametrize("text", ["", "hello\n", "{}\n", '{"qvl_recording": 99}\n'])
async def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a recording"):
        await ReplayBackend(path).open()
    with pytest.raises(ConfigError, match="cannot be read"):
        await ReplayBackend(tmp_path / "absent.jsonl").open()


async def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    async with RecordBackend(EchoBackend(), path) as backend:
        await backend.generate(ask("hello"))
        await backend.generate(ask("there"))
    path.write_text(path.read_text()[:-30])
    async with ReplayBackend(path) as backend:
        assert (await backend.generate(ask("hello"))).text == "hello"
        with pytest.raises(BackendResponseError, match="not recorded"):
            await backend.generate(ask("there"))
