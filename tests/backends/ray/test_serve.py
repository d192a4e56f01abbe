"""`qvl-serve --replicas` as a process: a killed replica, the end by SIGTERM, and what cannot be started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvl.suggest import install_line
from tests.server.conftest import data_url, question
from tests.server.processes import Process

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


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


def replicas_of(pid: int) -> set[int]:
    """The processes below `pid` in which a replica runs."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue
    found = set()
    for one, name in names.items():
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and name.startswith(b"ray::ServeReplica"):
            found.add(one)
    return found


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_replica_loses_no_request_and_sigterm_drains(serve: Callable[..., Process], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    process = serve("--replicas", "2", "--devices", "cpu", "--cache", "off").wait_ready()
    assert any("2 replicas under Ray Serve on 1 host" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)
    before = replicas_of(process.popen.pid)
    assert len(before) == 2
    body = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
    asked = [{**question(f"Describe it. {n}", data_url(colour)), **body} for n in range(2) for colour in COLOURS]
    with ThreadPoolExecutor(len(asked)) as pool:
        alone = [process.post(one).json()["choices"][0]["message"] for one in asked]
        answers = [pool.submit(process.post, one, timeout=300) for one in asked]
        time.sleep(0.3)
        os.kill(min(before), signal.SIGKILL)
        for answer, wanted in zip(answers, alone, strict=True):
            assert answer.result().status_code == 200, answer.result().text
            assert answer.result().json()["choices"][0]["message"] == wanted
        end = time.monotonic() + 120
        while len(replicas_of(process.popen.pid) - {min(before)}) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert _metric(process, "qvl_backend_replicas") == "2.0"
        # SIGTERM with work under way: what was begun is answered, then nothing of Ray is left.
        answers = [pool.submit(process.post, one, timeout=300) for one in asked]
        while not float(_metric(process, "qvl_backend_num_running")):
            time.sleep(0.02)
        process.popen.send_signal(signal.SIGTERM)
        statuses = {answer.result().status_code for answer in answers if answer.exception() is None}
        assert 200 in statuses
        assert statuses <= {200, 503}
        assert process.popen.wait(120) == 0
    assert not [pid for pid in before if Path(f"/proc/{pid}").exists()]


def _metric(process: Process, name: str) -> str:
    lines = process.get("/metrics").text.splitlines()
    return next((line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")), "0")


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
