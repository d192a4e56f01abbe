"""The pool behind a server: its counters in /metrics, and endpoints that come and go by SIGHUP."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from qvl.backends.base import Backend
from qvl.backends.openai.backend import OpenAIBackend
from qvl.server.pool_admin import reload_endpoints
from qvl.testing import RecordingBackend
from tests.scripted_endpoint import Echo, ScriptedEndpoint, ScriptedExchange
from tests.server.conftest import data_url, question
from tests.server.processes import CHAT

WORDS = "a long row of words " * 4


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("wrapped", [lambda backend: backend, RecordingBackend], ids=["itself", "wrapped"])
def test_metrics_have_the_counters_of_every_endpoint(serve, wrapped: Callable[[Backend], Backend]) -> None:
    go = threading.Event()

    async def echo_when_told(exchange: ScriptedExchange) -> None:
        await asyncio.to_thread(go.wait, 60)
        await Echo()(exchange)

    with ScriptedEndpoint(default=echo_when_told) as one, ScriptedEndpoint() as gone:
        backend = OpenAIBackend("echo", base_url=[one.url, gone.url], probe=False, health_interval=None)
        gone.stop()
        server = serve(wrapped(backend), cache="off")

        def value(name: str, url: str, **labels: str) -> float:
            wanted = [f'endpoint="{url}"', *(f'{key}="{told}"' for key, told in labels.items())]
            for line in server.get("/metrics").text.splitlines():
                if line.startswith(f"qvl_endpoint_{name}{{") and all(label in line for label in wanted):
                    return float(line.rsplit(" ", 1)[1])
            raise LookupError(name)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.post, CHAT, question(WORDS, data_url(size=(320, 320)))) for _ in range(4)]
            until(lambda: value("requests_running", one.url) == 4)
            # 100 tokens for each picture of 320 x 320.
            assert value("picture_tokens", one.url) >= 400
            go.set()
            assert all(answer.result().is_success for answer in asked)
        assert value("requests_total", one.url) == 4
        assert value("failures_total", one.url) == 0
        assert value("failures_total", gone.url) >= 1
        assert value("state", gone.url, state="resting") == 1
        assert value("state", one.url, state="up") == 1
        assert value("state", one.url, state="resting") == 0
        assert (value("requests_running", one.url), value("picture_tokens", one.url)) == (0, 0)


def test_the_endpoints_of_a_pool_that_is_wrapped_are_exchanged() -> None:
    backend = OpenAIBackend("echo", base_url=["http://a:1", "http://b:1"], probe=False, health_interval=None)
    asyncio.run(reload_endpoints(RecordingBackend(RecordingBackend(backend)), lambda: ["http://b:1", "http://c:1"]))
    assert [state.url for state in backend.endpoints()] == ["http://b:1/v1", "http://c:1/v1"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "config"])
def test_sighup_exchanges_endpoints_under_load_and_loses_no_answer(run, tmp_path: Path, way: str) -> None:
    with (
        ScriptedEndpoint(default=Echo(0.02)) as old,
        ScriptedEndpoint(default=Echo(0.02)) as kept,
        ScriptedEndpoint(default=Echo(0.02)) as new,
    ):
        path = tmp_path / "endpoints"

        def name(*endpoints: ScriptedEndpoint) -> None:
            if way == "file":
                path.write_text("".join(f"{endpoint.url} weight=2\n" for endpoint in endpoints))
            else:
                path.write_text(f"[serve]\nbase-url = {[endpoint.url for endpoint in endpoints]}\n")

        name(old, kept)
        where = {} if way == "file" else {"QVL_CONFIG": str(path)}
        arguments = ["--base-url-file", str(path)] if way == "file" else []
        process = run("openai:echo", *arguments, "--cache", "off", "--no-canary", **where).wait_ready()
        probed = len(old.chats)
        answers: list[httpx.Response] = []
        enough = threading.Event()

        def ask(number: int) -> None:
            with httpx.Client(base_url=process.address, timeout=60, trust_env=False) as client:
                for turn in itertools.count():
                    answers.append(client.post(CHAT, json={**question(f"{number} {turn} {WORDS}"), "stream": True}))
                    if enough.is_set():
                        return

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, number) for number in range(8)]
            try:
                until(lambda: len(old.chats) > probed and len(answers) >= 4)
                name(kept, new)
                process.popen.send_signal(signal.SIGHUP)
                until(lambda: any(WORDS in str(chat.body) for chat in new.chats))
            finally:
                enough.set()
            for one in asked:
                one.result()
        until(lambda: old.url not in process.get("/metrics").text)
        assert all(answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n") for answer in answers)
        # The new one was probed, and then asked.
        assert any(received.path.endswith("/models") for received in new.requests)
        sent = len(old.chats)
        for _ in range(4):
            assert process.post(question("again")).status_code == 200
        assert len(old.chats) == sent
        path.write_text("nonsense = [" if way == "config" else "nonsense")
        process.popen.send_signal(signal.SIGHUP)
        until(lambda: any("the old ones remain" in line for line in process.events()))
        assert process.post(question("once more")).status_code == 200
