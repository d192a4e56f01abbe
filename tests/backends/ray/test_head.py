"""A front whose cluster is not there yet, loses its head or ends says so, stays up, and goes on with the next one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.backends.ray.conftest import free_ports
from tests.server.conftest import question
from tests.server.processes import Process, launch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A cluster of one host at an address of its own, which can be killed whole and started anew."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        metrics, listen, runtime, agent = free_ports(4)
        command = [RAY, "start", "--head", f"--port={self.port}", "--num-cpus=2", f"--temp-dir={self.folder}"]
        # Its helpers get ports, since Ray waits only 15 s for them to choose their own.
        command += [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={listen}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--dashboard-agent-grpc-port={agent}"]
        command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
        subprocess.run(command, check=True, capture_output=True)

    def kill(self) -> None:
        # By what is in their command lines: `ray stop` would end every cluster of this host.
        for pid in {*below(str(self.folder)), *below("ray.util.client.server --address=", f":{self.port} ")}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def head() -> Iterator[Head]:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    (port,) = free_ports(1)
    one = Head(port, Path("/tmp") / f"qvl-ray-{os.getpid()}-{port}")
    yield one
    one.kill()
    shutil.rmtree(one.folder, ignore_errors=True)


@pytest.fixture
def fronts() -> Iterator[Callable[..., Process]]:
    """Starts fronts of one replica, which end with the test."""
    started: list[Process] = []

    def start(*args: str) -> Process:
        started.append(launch("--replicas", "1", "--devices", "cpu", "--cache", "off", *args, OMP_NUM_THREADS="1"))
        return started[-1]

    yield start
    for process in started:
        process.popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(60)
        process.end()


def below(*words: str) -> list[int]:
    """The processes with all of `words` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if all(word.encode() in line for word in words) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def until(front: Process, status: int, within: float = 240) -> str:
    """Waits until /ready answers with `status`; returns its reason."""
    end = time.monotonic() + within
    while True:
        assert front.popen.poll() is None, "\n".join(front.lines)
        with suppress(httpx.TransportError):
            answer = front.get("/ready")
            if answer.status_code == status:
                return str(answer.json().get("reason", ""))
        assert time.monotonic() < end, "\n".join(front.lines)
        time.sleep(0.5)


def children(pid: int) -> set[int]:
    """Those that any of its threads has started."""
    return {int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()}


def answered(front: Process) -> int:
    return front.post({**question("Describe it."), "max_tokens": 4}).status_code


def test_ready_is_503_once_the_head_is_gone(head: Head, fronts: Callable[..., Process]) -> None:
    head.start()
    front = fronts("--ray-address", head.address).wait_ready()
    assert front.get("/ready").status_code == 200
    for pid in below("gcs_server", str(head.folder)):
        os.kill(pid, signal.SIGKILL)
    assert "head" in until(front, 503)
    # Ray would have ended the process a minute after that.
    assert front.get("/health").status_code == 200


def test_a_front_waits_for_its_cluster_and_outlives_it(head: Head, fronts: Callable[..., Process]) -> None:
    front = fronts("--ray-address", head.address)
    said = front.wait_for("qvl-serve: waiting for an engine: ")
    assert f"no Ray cluster answers at '{head.address}'" in said
    front.address = front.wait_for("loading ").split()[2].removesuffix("/ready")
    assert "no engine answers yet" in until(front, 503)
    assert answered(front) == 503
    head.start()
    until(front, 200)
    assert answered(front) == 200
    head.kill()
    assert "head" in until(front, 503)
    assert front.get("/health").status_code == 200
    # At the same address, but it knows nothing of the one before.
    head.start()
    until(front, 200)
    assert answered(front) == 200
    assert len([line for line in front.lines if line.startswith("qvl-serve: waiting")]) == 1
    front.popen.terminate()
    assert front.ended(60) == 0


@pytest.mark.parametrize("part", ["/raylet/raylet ", "/gcs/gcs_server "])
def test_a_cluster_of_its_own_that_dies_is_replaced(fronts: Callable[..., Process], part: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    front = fronts().wait_ready()
    (worker,) = children(front.popen.pid)
    ours = children(worker) & set(below(part))
    assert len(ours) == 1
    os.kill(ours.pop(), signal.SIGKILL)
    until(front, 503)
    until(front, 200)
    assert answered(front) == 200
    assert children(front.popen.pid) != {worker}
