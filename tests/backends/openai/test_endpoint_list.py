"""The endpoints of a pool as a list that changes while the pool works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.endpoint import Endpoint
from qvl.backends.openai.endpoint_list import Listed, read_endpoint_list
from qvl.errors import ConfigError
from qvl.testing.asking import ask
from tests.scripted_endpoint import Echo, ScriptedEndpoint

pytestmark = pytest.mark.anyio
WORDS = "a long row of words that takes its time"


@pytest.fixture
def three() -> Iterator[list[ScriptedEndpoint]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ScriptedEndpoint(default=Echo(0.01))) for _ in range(3)]


def over(*endpoints: ScriptedEndpoint, **options: Any) -> OpenAIBackend:
    settings: dict[str, Any] = {"probe": False, "health_interval": None, **options}
    return OpenAIBackend("echo", base_url=[endpoint.url for endpoint in endpoints], **settings)


def names(backend: OpenAIBackend) -> list[str]:
    return [state.url for state in backend.endpoints()]


async def test_endpoints_are_exchanged_under_load_and_no_answer_is_lost(three: list[ScriptedEndpoint]) -> None:
    old, kept, new = three
    async with over(old, kept) as backend:
        before = [asyncio.ensure_future(backend.generate(ask(WORDS))) for _ in range(20)]
        while len(old.chats) + len(kept.chats) < len(before):
            await asyncio.sleep(0.001)
        changing = asyncio.ensure_future(backend.set_endpoints([kept.url, new.url]))
        while names(backend) == [old.url, kept.url]:
            await asyncio.sleep(0.001)
        sent = len(old.chats)
        after = [asyncio.ensure_future(backend.generate(ask(WORDS))) for _ in range(20)]
        answers = await asyncio.gather(*before, *after)
        await asyncio.wait_for(changing, 30)
        assert names(backend) == [kept.url, new.url]
        assert backend.stats()["failures_total"] == backend.stats()["retries_total"] == 0
    assert {answer.text for answer in answers} == {WORDS}
    assert (len(old.chats), bool(new.chats)) == (sent, True)
    assert sum(len(endpoint.chats) for endpoint in three) == 40


async def test_an_endpoint_named_again_while_it_drains_is_taken_back(three: list[ScriptedEndpoint]) -> None:
    one, two, _ = three
    one.default = Echo(0.05)
    async with over(one, two, policy="round_robin") as backend:
        running = asyncio.ensure_future(backend.generate(ask(WORDS)))
        while not one.chats:
            await asyncio.sleep(0.001)
        changing = asyncio.ensure_future(backend.set_endpoints([two.url]))
        while backend.endpoints()[0].state != "draining":
            await asyncio.sleep(0.001)
        await backend.set_endpoints([one.url, two.url])
        assert {state.state for state in backend.endpoints()} == {"up"}
        await asyncio.gather(running, changing)
        assert names(backend) == [one.url, two.url]
        await asyncio.gather(*(backend.generate(ask("hello")) for _ in range(4)))
    assert len(one.chats) == 3


async def test_of_two_changes_at_once_the_later_one_holds(three: list[ScriptedEndpoint]) -> None:
    one, two, new = three
    async with over(one, two) as backend:
        for first, last in (([one], [one, two]), ([one, new], [two]), ([one], [one, two, new])):
            await asyncio.gather(*(backend.set_endpoints([each.url for each in some]) for some in (first, last)))
            assert set(names(backend)) == {each.url for each in last}
            assert {state.state for state in backend.endpoints()} == {"up"}


async def test_a_new_endpoint_is_probed_before_it_gets_a_request(three: list[ScriptedEndpoint]) -> None:
    with ScriptedEndpoint(ignores=("response_format",)) as weak:
        async with over(three[0], probe=True) as backend:
            assert backend.capabilities.json_schema
            await backend.set_endpoints([three[0].url, weak.url])
            assert not backend.capabilities.json_schema
            await backend.set_endpoints([three[0].url])
            assert backend.capabilities.json_schema


async def test_an_endpoint_that_does_not_answer_comes_in_resting_and_is_tried_again(
    three: list[ScriptedEndpoint],
) -> None:
    one, late, _ = three
    late.stop()
    async with over(one, probe=True, health_interval=0.05) as backend:
        await backend.set_endpoints([one.url, late.url])
        assert [state.state for state in backend.endpoints()] == ["up", "resting"]
        assert (await backend.generate(ask("hello"))).text == "hello"
        late.start()
        while backend.endpoints()[1].state != "up":
            await backend.generate(ask("hello"))
            await asyncio.sleep(0.01)
        assert late.chats


async def test_weights_and_limits_change_in_place(three: list[ScriptedEndpoint]) -> None:
    one, two, _ = three
    async with over(one, two, policy="round_robin", limit=7) as backend:
        await backend.set_endpoints([Listed(one.url, weight=3.0, limit=2), Listed(two.url)])
        assert [(s.weight, s.limit) for s in backend.endpoints()] == [(3.0, 2), (1.0, 7)]
        for _ in range(8):
            await backend.generate(ask("hello"))
    assert (len(one.chats), len(two.chats)) == (6, 2)


async def test_a_list_that_cannot_be_changes_nothing(three: list[ScriptedEndpoint]) -> None:
    async with over(*three[:2]) as backend:
        before = backend.endpoints()
        for wrong in ([], [three[2].url, "ftp://x"], [three[2].url, three[2].url]):
            with pytest.raises(ConfigError):
                await backend.set_endpoints(wrong)
        assert backend.endpoints() == before


async def test_endpoints_that_are_not_taken_in_are_closed(
    three: list[ScriptedEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Endpoint] = []
    async with over(three[0]) as backend:
        make = backend._fleet.make

        def noted(*args: Any) -> Any:
            member = make(*args)
            made.append(member.target.endpoint)
            return member

        async def broken(line: object) -> None:
            raise ConfigError("not like this")

        monkeypatch.setattr(backend._fleet, "make", noted)
        monkeypatch.setattr(backend._fleet, "findings_of", broken)
        with pytest.raises(ConfigError):
            await backend.set_endpoints([one.url for one in three])
        assert [endpoint._sdk for endpoint in made] == [None, None]
        assert len(backend.endpoints()) == 1


def test_a_file_lists_urls_weights_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "endpoints"
    path.write_text("# eight NPUs\nhttp://a:8000\n\nhttp://me:secret@b:8000/v1/ weight=2.5 limit=4 # the big one\n")
    listed = read_endpoint_list(path)
    assert listed == [Listed("http://a:8000/v1"), Listed("http://me:secret@b:8000/v1", 2.5, 4)]
    assert [one.name for one in listed] == ["http://a:8000/v1", "http://b:8000/v1"]
    backend = OpenAIBackend("m", base_url=listed, limit=9)
    assert [(s.url, s.weight, s.limit) for s in backend.endpoints()] == [
        ("http://a:8000/v1", 1.0, 9),
        ("http://b:8000/v1", 2.5, 4),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "base_url is empty"),
        ("http://a\nhttp://a/v1", "duplicate endpoint"),
        ("http://a\nnonsense", "line 2.*invalid endpoint URL"),
        ("http://a:99999", "line 1.*invalid endpoint URL"),
        ("http://[a", "line 1.*invalid endpoint URL"),
        ("shop:secret@a:8000/v1?key=secret", "line 1: invalid endpoint URL 'a:8000/v1'"),
        ("http://a weight=0", "line 1.*weight"),
        ("http://a weight=x", "line 1"),
        ("http://a limit=0", "line 1.*limit"),
        ("http://a wait=1", "line 1.*expected weight= or limit="),
    ],
)
def test_a_wrong_list_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "endpoints"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_endpoint_list(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_endpoint_list(tmp_path / "none")
