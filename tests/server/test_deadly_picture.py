"""A picture that kills engines, through `qvl-serve` in front of engines with the bundled model: every one a process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.server.conftest import data_url, question
from tests.server.processes import Process, launch
from tests.server.test_workers import children, until, value

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZE = (96, 32)
DEADLY = data_url("black", SIZE)
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def engine() -> Iterator[Callable[..., Process]]:
    """Starts engines that the picture kills."""
    started: list[Process] = []

    def start(when: str, port: str = "0") -> Process:
        command = [sys.executable, "-m", "tests.server.killed_by_picture", "x".join(map(str, SIZE)), when]
        popen = subprocess.Popen([*command, "--port", port, "--cache", "off"], stderr=subprocess.PIPE, text=True)
        started.append(Process(popen))
        return started[-1]

    yield start
    for process in started:
        process.end()


def alive(engines: list[Process]) -> list[Process]:
    return [one for one in engines if one.popen.poll() is None]


def ask(front: Process, url: str, text: str = "What is it?") -> tuple[int, str | None]:
    """Status and code of a greedy question about a picture."""
    answer = front.post({**question(text, url), "max_tokens": 6, "temperature": 0})
    return answer.status_code, answer.json().get("error", {}).get("code")


@pytest.mark.parametrize(("when", "workers"), [("before", 1), ("after", 2)])
def test_two_engines_die_and_the_third_answers_everybody_else(
    engine: Callable[..., Process], when: str, workers: int
) -> None:
    engines = [engine(when) for _ in range(3)]
    urls = [word for one in engines for word in ("--base-url", one.wait_ready().address + "/v1")]
    front = launch("openai:bundled", *urls, "--cache", "off", "--workers", str(workers))
    others: Counter[tuple[int, str | None]] = Counter()
    stop = threading.Event()

    def innocent(colour: str) -> None:
        while not stop.is_set():
            others[ask(front, data_url(colour))] += 1

    try:
        front.wait_ready()
        until(lambda: workers == 1 or len(children(front)) == workers)
        threads = [threading.Thread(target=innocent, args=(colour,)) for colour in COLOURS]
        for thread in threads:
            thread.start()
        until(lambda: sum(others.values()) > 8)
        # It dies of it at one engine, goes to another as the only suspect there, and to no third one.
        assert ask(front, DEADLY) == (400, "image_quarantined")
        until(lambda: len(alive(engines)) == 1)
        # Nor does any later request with it, whichever worker, question or route.
        for number in range(8):
            assert ask(front, DEADLY, f"And now? {number}") == (400, "image_quarantined")
        source = {"type": "base64", "media_type": "image/png", "data": DEADLY.partition(",")[2]}
        turn = {"role": "user", "content": [{"type": "image", "source": source}]}
        refused = front.post({"model": "bundled", "max_tokens": 4, "messages": [turn]}, "/v1/messages")
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert "in quarantine: 2 engines died while they answered it" in refused.json()["error"]["message"]
        before = sum(others.values())
        until(lambda: sum(others.values()) > before + 8)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(others) == {(200, None)}
        assert value(front.get("/metrics").text, "qvl_backend_pictures_quarantined") >= 1
        assert len(alive(engines)) == 1
        # Released, it kills the last one; the front stays, and goes on with an engine that is started again.
        (last,) = alive(engines)
        port = last.address.rpartition(":")[2]
        front.popen.send_signal(signal.SIGHUP)
        until(lambda: value(front.get("/metrics").text, "qvl_backend_pictures_quarantined") == 0)
        assert ask(front, DEADLY)[0] in (502, 503)
        last.popen.wait(30)
        until(lambda: front.get("/ready").status_code == 503)
        assert front.popen.poll() is None
        assert front.get("/health").status_code == 200
        engine(when, port).wait_ready()
        until(lambda: ask(front, data_url("red"))[0] == 200)
        until(lambda: front.get("/ready").status_code == 200)
    finally:
        stop.set()
        front.popen.terminate()
        front.ended(60)
        front.end()
