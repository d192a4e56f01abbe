"""Several endpoints behind one backend, over real connections."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from qvl import AsyncPipeline
from qvl.backends.openai.backend import OpenAIBackend
from qvl.errors import AuthError, BackendUnavailableError, ConfigError, QvlError, UnknownNameError
from qvl.testing.asking import ask, idle, square
from tests.scripted_endpoint import Echo, ScriptedEndpoint, Status

pytestmark = pytest.mark.anyio


@pytest.fixture
def four() -> Iterator[list[ScriptedEndpoint]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ScriptedEndpoint(default=Echo(0.002))) for _ in range(4)]


def over(endpoints: list[ScriptedEndpoint], **options: Any) -> OpenAIBackend:
    settings: dict[str, Any] = {"probe": False, "health_interval": None, **options}
    return OpenAIBackend("echo", base_url=[endpoint.url for endpoint in endpoints], **settings)


async def test_one_of_four_killed_under_load_loses_no_request_and_doubles_none(four: list[ScriptedEndpoint]) -> None:
    async with over(four) as backend:

        async def one(number: int) -> str:
            return (await backend.generate(ask(f"request number {number} of a long row of words"))).text

        tasks = [asyncio.ensure_future(one(number)) for number in range(200)]
        while len(four[0].chats) < 20:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(four[0].stop)
        answers = await asyncio.gather(*tasks)
        await idle(backend)
        states = {state.url: state for state in backend.endpoints()}
    assert answers == [f"request number {n} of a long row of words" for n in range(200)]
    assert states[four[0].url].state == "resting"
    assert {state.running for state in states.values()} == {0}


async def test_a_pipeline_asks_on_while_one_of_four_is_killed(four: list[ScriptedEndpoint]) -> None:
    words = "answer number {} of a long row of words"
    async with AsyncPipeline(backend=over(four), cache="off") as pipe:
        tasks = [asyncio.ensure_future(pipe.ask([], words.format(number))) for number in range(200)]
        # In the middle of answers, so that some are cut off after their first words.
        while not (len(four[0].chats) > 20 and four[0].running):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(four[0].stop)
        answers = await asyncio.gather(*tasks)
    assert [answer.text for answer in answers] == [words.format(number) for number in range(200)]


async def test_one_of_four_killed_before_it_answers_costs_nobody_anything(four: list[ScriptedEndpoint]) -> None:
    four[0].stop()
    async with over(four) as backend:
        answers = await asyncio.gather(*(backend.generate(ask(f"number {n}")) for n in range(200)))
        stats = backend.stats()
    assert [answer.text for answer in answers] == [f"number {n}" for n in range(200)]
    assert stats["failovers_total"] >= 1
    assert stats["endpoints_up"] == 3
    assert sum(len(endpoint.chats) for endpoint in four) == 200


async def test_all_killed_gives_one_error_that_names_each(four: list[ScriptedEndpoint]) -> None:
    for endpoint in four:
        endpoint.stop()
    async with over(four, max_retries=1) as backend:
        with pytest.raises(BackendUnavailableError) as caught:
            await backend.generate(ask("hello"))
        assert backend.unready() is not None
    assert all(endpoint.url in str(caught.value) for endpoint in four)
    with pytest.raises(BackendUnavailableError) as caught:
        await over(four, probe=True).open()
    assert all(endpoint.url in str(caught.value) for endpoint in four)


async def test_an_endpoint_that_comes_back_is_used_again(four: list[ScriptedEndpoint]) -> None:
    two = four[:2]
    two[0].stop()
    async with over(two, health_interval=0.05) as backend:
        for n in range(4):
            await backend.generate(ask(f"number {n}"))
        assert backend.endpoints()[0].state == "resting"
        two[0].start()
        for _ in range(200):
            await backend.generate(ask("are you there?"))
            if backend.endpoints()[0].state == "up":
                break
            await asyncio.sleep(0.02)
        assert two[0].chats


async def test_a_failing_endpoint_is_passed_over_without_a_pause(
    four: list[ScriptedEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It rests for all of the test, on a slow machine too.
    monkeypatch.setattr("qvl.backends.openai.pool.FIRST_REST", 60.0)
    four[0].default = Status(500, {"error": {"message": "broken"}})
    async with over(four, policy="round_robin") as backend:
        for n in range(24):
            assert (await backend.generate(ask(f"number {n}"))).text == f"number {n}"
        assert backend.endpoints()[0].state == "resting"
        assert "broken" in (backend.endpoints()[0].last_error or "")
    assert len(four[0].chats) == 3


async def test_a_busy_endpoint_is_left_to_itself(four: list[ScriptedEndpoint]) -> None:
    four[0].default = Status(429, {"error": {"message": "full"}}, {"Retry-After": "30"})
    async with over(four) as backend:
        await asyncio.gather(*(backend.generate(ask(f"number {n}")) for n in range(40)))
        assert backend.endpoints()[0].state == "busy"


async def test_a_bad_request_is_not_tried_at_every_endpoint(four: list[ScriptedEndpoint]) -> None:
    for endpoint in four:
        endpoint.default = Status(400, {"error": {"message": "no such thing"}})
    async with over(four) as backend:
        with pytest.raises(QvlError, match="no such thing"):
            await backend.generate(ask("hello"))
        assert {state.state for state in backend.endpoints()} == {"up"}
    assert sum(len(endpoint.chats) for endpoint in four) == 1


async def test_the_same_picture_goes_to_the_same_endpoint(four: list[ScriptedEndpoint]) -> None:
    pictures = [square((n * 20, 40, 90)) for n in range(12)]
    async with over(four, policy="affinity") as backend:
        # One after the other: endpoints with much more than their share of the load hand pictures on.
        for number in range(3):
            for picture in pictures:
                await backend.generate(ask(f"question {number}", picture))
    counts = Counter(
        (endpoint.port, chat.body["messages"][0]["content"][0]["image_url"]["url"])
        for endpoint in four
        for chat in endpoint.chats
    )
    assert set(counts.values()) == {3}
    assert len({port for port, _ in counts}) > 1


async def test_a_limit_holds_at_every_endpoint(four: list[ScriptedEndpoint]) -> None:
    async with over(four[:2], limit=2) as backend:
        most = 0
        tasks = [asyncio.ensure_future(backend.generate(ask("a few words to say here"))) for _ in range(20)]
        while not all(task.done() for task in tasks):
            most = max(most, *(endpoint.running for endpoint in four[:2]))
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        assert most == 2
        assert backend.stats()["num_waiting"] == 0


async def test_endpoints_come_and_go_at_run_time(four: list[ScriptedEndpoint]) -> None:
    async with over(four[:1], probe=True) as backend:
        await backend.add_endpoint(four[1].url, weight=2.0)
        with pytest.raises(ConfigError, match="already"):
            await backend.add_endpoint(four[1].url)
        running = [asyncio.ensure_future(backend.generate(ask("a few words to say here"))) for _ in range(12)]
        await asyncio.sleep(0.005)
        await backend.remove_endpoint(four[0].url)
        assert [state.url for state in backend.endpoints()] == [four[1].url]
        assert {result.text for result in await asyncio.gather(*running)} == {"a few words to say here"}
        with pytest.raises(ConfigError, match="last endpoint"):
            await backend.remove_endpoint(four[1].url)
        with pytest.raises(UnknownNameError):
            await backend.remove_endpoint("http://elsewhere:1/v1")


async def test_capabilities_are_what_all_can_do(four: list[ScriptedEndpoint]) -> None:
    with ScriptedEndpoint(ignores=("response_format",), refuses=("tools",), max_model_len=5000) as weak:
        async with over([four[0], weak], probe=True) as backend:
            assert backend.capabilities.images
            assert not backend.capabilities.json_schema
            assert not backend.capabilities.lists
            assert not backend.capabilities.tools
            assert backend.capabilities.max_context == 5000


async def test_a_dead_endpoint_at_the_start_is_probed_when_it_comes(four: list[ScriptedEndpoint]) -> None:
    late = ScriptedEndpoint(ignores=("response_format",)).start()
    url = late.url
    late.stop()
    async with OpenAIBackend("echo", base_url=[four[0].url, url], health_interval=0.05) as backend:
        assert backend.capabilities.json_schema
        late.start()
        for _ in range(200):
            await backend.generate(ask("hello"))
            if not backend.capabilities.json_schema:
                break
            await asyncio.sleep(0.02)
        assert not backend.capabilities.json_schema
    late.stop()


async def test_a_wrong_key_or_model_everywhere_keeps_its_class() -> None:
    with ScriptedEndpoint(api_key="right") as one, ScriptedEndpoint(api_key="right") as two:
        with pytest.raises(AuthError):
            await over([one, two], probe=True, api_key="wrong").open()
        async with over([one, two], probe=True, api_key="right") as backend:
            assert (await backend.generate(ask("hello"))).text == "hello"


async def test_a_misspelt_model_is_told_the_nearest_one() -> None:
    with ScriptedEndpoint(models=("qwen3-vl-8b",)) as one:
        backend = OpenAIBackend("qwen3vl-8b", base_url=one.url)
        with pytest.raises(UnknownNameError, match="did you mean 'qwen3-vl-8b'"):
            await backend.open()
