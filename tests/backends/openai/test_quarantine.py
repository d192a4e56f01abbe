"""A picture that killed two engines is refused, and an answer that broke off goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qvl.backends.base import CUT_OFF
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.failures import Failed
from qvl.backends.openai.transport import StraightTransport
from qvl.backends.quarantine import Quarantine
from qvl.errors import BackendResponseError, MediaError
from qvl.media.gate import load
from qvl.testing.asking import ask
from qvl.types import ChatRequest
from tests.scripted_endpoint import CutOff, ScriptedEndpoint, Text
from tests.server.conftest import picture

pytestmark = pytest.mark.anyio
POISON = picture("black", (64, 64))


def about(colour: str, text: str = "what is it") -> ChatRequest:
    return ask(text, load(POISON if colour == "poison" else picture(colour)))


@pytest.fixture
def engines() -> Iterator[Callable[[int], list[str]]]:
    """Starts engines that the poison kills; returns their URLs."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> list[str]:
        command = [sys.executable, "-m", "tests.backends.openai.dying_engine", hashlib.sha256(POISON).hexdigest()]
        started.extend(subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count))
        return [process.stdout.readline().strip() for process in started[-count:] if process.stdout is not None]

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_the_third_engine_lives_and_nobody_else_is_refused(
    engines: Callable[[int], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "quarantine.json"
    urls = engines(3)
    options = {"probe": False, "health_interval": None, "max_retries": 8}
    async with OpenAIBackend("echo", base_url=urls, quarantine=str(file), **options) as backend:
        innocent = [
            asyncio.ensure_future(backend.generate(about(colour, f"{number} words to say")))
            for number, colour in enumerate(["red", "green", "blue", "white"] * 6)
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(MediaError, match="quarantine") as caught:
            await backend.generate(about("poison"))
        assert caught.value.code == "image_quarantined"
        assert caught.value.picture == 0
        assert [result.text for result in await asyncio.gather(*innocent)]
        assert backend.stats()["pictures_quarantined"] == 1
        # The third one answers everybody but it, and a second client with the same file is not tried with it either.
        assert (await backend.generate(about("red"))).text
        with pytest.raises(MediaError):
            await backend.generate(about("poison", "another question"))
        assert backend.stats()["quarantine_refusals_total"] == 2
        (living,) = [endpoint.url for endpoint in backend.endpoints() if endpoint.state == "up"]
        async with OpenAIBackend("echo", base_url=living, quarantine=str(file), probe=False) as other:
            with pytest.raises(MediaError):
                await other.generate(about("poison"))
            assert (await other.generate(about("red"))).text
            # What is deleted from the file is released, in every process.
            file.write_text("{}")
            assert other.stats()["pictures_quarantined"] == 0
            assert backend.stats()["pictures_quarantined"] == 0


@pytest.mark.slow
async def test_requests_with_one_suspected_picture_cost_one_engine(
    engines: Callable[[int], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "quarantine.json"
    Quarantine(file).killed(about("poison"), "one before", suspect=False)
    options = {"probe": False, "health_interval": None, "max_retries": 8}
    async with OpenAIBackend("echo", base_url=engines(3), quarantine=str(file), **options) as backend:
        asked = [backend.generate(about("poison", f"question {number}")) for number in range(4)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [getattr(answer, "code", answer) for answer in answers] == ["image_quarantined"] * 4
        assert [endpoint.state for endpoint in backend.endpoints()].count("up") == 2


@pytest.mark.slow
async def test_one_that_is_quarantined_while_it_waits_for_a_place_is_refused(
    engines: Callable[[int], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "quarantine.json"
    options = {"probe": False, "health_interval": None, "limit": 1}
    async with OpenAIBackend("echo", base_url=engines(1), quarantine=str(file), **options) as backend:
        before = asyncio.ensure_future(backend.generate(about("red", "ten words " * 40)))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(backend.generate(about("poison")))
        await asyncio.sleep(0.1)
        assert not before.done()
        Quarantine(file).killed(about("poison"), "another", suspect=True)
        with pytest.raises(MediaError, match="quarantine"):
            await waiting
        assert (await before).text
        assert (await backend.generate(about("red"))).text


def test_one_that_is_answered_elsewhere_is_cleared() -> None:
    held = Quarantine()
    # Two requests with it broke off, at one death.
    held.killed(about("red"), "a", suspect=False)
    held.killed(about("red"), "a", suspect=False)
    assert held.suspects(about("red"))
    held.refuse(about("red"))
    held.cleared(about("red"))
    assert not held.suspects(about("red"))
    held.killed(about("red"), "b", suspect=False)
    held.refuse(about("red"))
    held.killed(about("red"), "c", suspect=True)
    with pytest.raises(MediaError):
        held.refuse(about("red"))
    held.release()
    held.refuse(about("red"))


def test_it_is_bounded_and_ends_by_itself(tmp_path: Path) -> None:
    now = [1000.0]
    held = Quarantine(tmp_path / "held.json", seconds=60, most=2, clock=lambda: now[0])
    for colour in ("red", "green", "blue"):
        held.killed(about(colour), "a", suspect=False)
        held.killed(about(colour), "b", suspect=True)
    assert len(held) == 2
    held.refuse(about("red"))
    with pytest.raises(MediaError, match="1 min"):
        held.refuse(about("blue"))
    assert len(json.loads((tmp_path / "held.json").read_text())) == 2
    now[0] += 61
    held.refuse(about("blue"))
    assert len(held) == 0


OTHER = """
import sys
from qvl.backends.quarantine import Quarantine
from tests.backends.openai.test_quarantine import about
held = Quarantine(sys.argv[1])
held.killed(about("red"), "a", suspect=False)
assert held.begin(about("red"), "b")
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes share no locks there")
def test_processes_of_a_host_suspect_together_and_try_one_suspect_at_a_time(tmp_path: Path) -> None:
    """Else the picture of one would be blamed for an engine that died of a picture of the other."""
    file = tmp_path / "held.json"
    held = Quarantine(file)
    assert not held.suspects(about("red"))
    command = [sys.executable, "-c", OTHER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        assert held.suspects(about("red"))
        assert not held.begin(about("green"), "b")
        # Nor with the same pictures at another engine, which would cost that too.
        assert not held.begin(about("red"), "c")
        assert held.begin(about("green"), "c")
        other.kill()
    # Its end frees what it held.
    assert held.begin(about("red"), "b")
    assert not held.begin(about("blue"), "b")
    assert not held.begin(about("red"), "d")
    held.tried(about("red"), "b")
    assert held.begin(about("red"), "b")
    held.cleared(about("red"))
    assert not Quarantine(file).suspects(about("red"))


def sampled(request: ChatRequest, **fields: object) -> ChatRequest:
    return request.replace(sampling=replace(request.sampling, **fields))


async def test_an_answer_that_breaks_off_goes_on_at_another_endpoint_without_a_word_twice() -> None:
    request = sampled(ask("a long row of words to say"), temperature=0.0)
    with ScriptedEndpoint(CutOff(after=4)) as one, ScriptedEndpoint() as other:
        async with OpenAIBackend("echo", base_url=other.url, probe=False) as alone:
            whole = (await alone.generate(request)).text
        async with OpenAIBackend("echo", base_url=[one.url, other.url], probe=False, policy="round_robin") as backend:
            pieces = [chunk.text async for chunk in backend.stream(request)]
            assert "".join(pieces) == whole
            assert len(one.chats) == 1
            assert backend.stats()["continued_total"] == 1


@pytest.mark.parametrize("fields", [{"temperature": 1.0}, {"temperature": 0.0}])
async def test_where_that_is_not_exact_the_error_is_that_of_the_break(fields: dict[str, float]) -> None:
    request = sampled(ask("a long row of words to say"), **fields)
    with ScriptedEndpoint(CutOff(after=4)) as one, ScriptedEndpoint(default=Text("Other words than those")) as other:
        async with OpenAIBackend("echo", base_url=[one.url, other.url], probe=False, policy="round_robin") as backend:
            with pytest.raises(BackendResponseError, match="broke off") as caught:
                _ = [chunk async for chunk in backend.stream(request)]
            assert caught.value.code == CUT_OFF
            assert len(other.chats) == (1 if fields["temperature"] == 0.0 else 0)
            assert backend.stats()["continued_total"] == 0


async def test_an_endpoint_that_dies_of_a_request_on_a_kept_connection_is_not_taken_for_untouched() -> None:
    """The first connection breaks off without a byte, as a stale one does, and a second one is refused."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                if len(heads) == 2:
                    server.close()
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    transport = StraightTransport(url, {}, connect_timeout=5, verify=True, where=url)
    by = time.monotonic() + 10
    reply = await transport.models(by)
    while await reply.read(by):
        pass
    await reply.close()
    with pytest.raises(Failed) as caught:
        await transport.models(by)
    await transport.aclose()
    assert len(heads) == 2
    assert caught.value.broke
    assert not caught.value.untouched
