"""`qvl-serve --replicas` as a process: a killed replica, the end by SIGTERM, and what cannot be started."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from qvl.suggest import install_line
from qvl.tiny import render
from tests.server.conftest import data_url_of, question
from tests.server.processes import CHAT, Process

# Answers to the last bit, whichever replica gives one, whatever else it computes beside it, and whatever it measured.
EXACT = [word for one in ("batch_invariant=true", "dtype=float32", "decode_kernel=plain") for word in ("--option", one)]


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(*args: str, code: str = "from qvl.cli.serve import main; main()", **env: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-c", code, "--port", "0", *args],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        started.append(Process(popen))
        return started[-1]

    yield make
    for process in started:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGTERM)
            try:
                process.popen.wait(60)
            except subprocess.TimeoutExpired:
                process.popen.kill()
        process.popen.wait(10)
        process.popen.stderr.close()


def replicas_of(pid: int) -> set[psutil.Process]:
    """The processes below `pid` in which a replica runs."""
    found = set()
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if one.cmdline()[:1] and one.cmdline()[0].startswith("ray::ServeReplica"):
                found.add(one)
    return found


def alive(process: psutil.Process) -> bool:
    """False once it has ended, even if nobody has asked how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def drawn(seed: int) -> bytes:
    held = io.BytesIO()
    render.sample(seed)[1].save(held, "PNG")
    return held.getvalue()


def answered(process: Process, body: dict[str, Any]) -> str:
    answer = process.post(body, timeout=300)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def streamed(process: Process, body: dict[str, Any], begun: threading.Event) -> str:
    """The same as a stream; `begun` is set when its first words are there, or it ends without."""
    text = ""
    try:
        with httpx.stream(
            "POST", process.address + CHAT, json={**body, "stream": True}, timeout=300, trust_env=False
        ) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    if text:
                        begun.set()
    finally:
        begun.set()
    return text


def until(holds: Callable[[], bool], what: str, within: float = 240) -> None:
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def metric(process: Process, name: str) -> float:
    lines = process.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"qvl_backend_{name} ")), 0.0)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_replica_loses_no_request_and_sigterm_drains(serve: Callable[..., Process]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    settings = ("--replicas", "2", "--devices", "cpu", "--cache", "off", "--drain-timeout", "240", *EXACT)
    process = serve(*settings).wait_ready()
    assert any("2 replicas under Ray Serve on 1 host" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)
    before = replicas_of(process.popen.pid)
    assert len(before) == 2
    # So many pictures that each replica has some of them, and so long that none is answered before all have begun.
    body = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}
    asked = [{**question("Describe it.", data_url_of(drawn(seed))), **body} for seed in range(6000, 6016)]
    with ThreadPoolExecutor(len(asked)) as pool:

        def ask_all() -> list[Future[str]]:
            return [pool.submit(answered, process, one) for one in asked]

        undisturbed = [answer.result() for answer in ask_all()]
        assert len(set(undisturbed)) > len(asked) / 2
        assert metric(process, "moved_total") == 0
        # The front knows of requests before a replica does; what has begun there, its first words tell.
        begun = [threading.Event() for _ in asked]
        streams = [pool.submit(streamed, process, *one) for one in zip(asked, begun, strict=True)]
        assert all(event.wait(240) for event in begun)
        killed = min(before, key=lambda one: one.pid)
        killed.kill()
        assert [stream.result() for stream in streams] == undisturbed
        assert metric(process, "moved_total") > 0
        until(lambda: len(replicas_of(process.popen.pid) - {killed}) == 2, "the killed replica was not replaced")
        until(lambda: metric(process, "replicas_running") == 2, "its successor never ran")
        # SIGTERM with work under way: what was begun is answered, then nothing of Ray is left.
        started = psutil.Process(process.popen.pid).children(recursive=True)
        answers = ask_all()
        until(lambda: metric(process, "num_running") == len(asked), "not all requests were under way at once")
        process.popen.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == undisturbed
    assert process.ended(300) == 0
    until(lambda: not any(map(alive, started)), "something of Ray is left")


WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from qvl.cli.serve import main; main()"


def refusal(process: Process) -> tuple[int, str]:
    """Exit code and the one line of a start that fails."""
    code = process.ended(120)
    said = [line for line in process.lines if line and not line.startswith(("{", "loading", "qvl: no model named"))]
    assert len(said) == 1, said
    return code, said[0]


def test_without_ray_the_pip_line_is_said(serve: Callable[..., Process]) -> None:
    code, line = refusal(serve("x", "--replicas", "2", code=WITHOUT_RAY))
    assert code == 2
    assert install_line("ray") in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("x", "--devices", "npu"), "--replicas 8 --devices npu"),
        (("x", "--ray-address", "auto"), "need --replicas"),
        (("x", "--replicas", "2", "--devices", "tpu"), "one of auto, npu, cuda, cpu"),
        (("x", "--replicas", "2", "--ray-address", "ray://head:10001"), "cannot stream answers"),
        (("x", "--replicas", "2", "--ray-address", "head"), "auto, or HOST:6379"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    serve: Callable[..., Process], args: tuple[str, ...], words: str
) -> None:
    code, line = refusal(serve(*args, code=WITHOUT_RAY))
    assert code == 2
    assert words in line


@pytest.mark.ray
def test_what_ray_cannot_do_is_said_in_one_line(serve: Callable[..., Process]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    started = {
        "several endpoints": serve("openai:x", "--replicas", "2"),
        "no option": serve("--replicas", "2", "--option", "colour=red"),
    }
    for words, process in started.items():
        code, line = refusal(process)
        assert code in (1, 2)
        assert words in line
