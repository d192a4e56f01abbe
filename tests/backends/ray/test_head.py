"""A front whose cluster has lost its head says so, and goes on when the head is back or it is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.ray.conftest import free_ports
from tests.server.processes import launch

pytestmark = pytest.mark.ray
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of one host, of its own."""
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    (port,) = free_ports(1)
    folder = Path("/tmp") / f"qvl-ray-{os.getpid()}"
    command = [RAY, "start", "--head", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
    subprocess.run([*command, "--include-dashboard=false", "--disable-usage-stats"], check=True, capture_output=True)
    yield f"127.0.0.1:{port}"
    # By the folder in their command lines: `ray stop` would end every cluster of this host.
    for pid in below(str(folder)):
        os.kill(pid, signal.SIGKILL)


def below(word: str) -> list[int]:
    """The processes with `word` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_ready_is_503_once_the_head_is_gone(head: str) -> None:
    port = head.rsplit(":", 1)[1]
    front = launch("--replicas", "1", "--devices", "cpu", "--ray-address", head, "--cache", "off")
    try:
        front.wait_ready()
        assert front.get("/ready").status_code == 200
        gcs = [pid for pid in below("gcs_server") if any(pid == one for one in below(port))]
        assert gcs
        for pid in gcs:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while (answer := front.get("/ready")).status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.5)
        assert answer.status_code == 503
        assert "head" in answer.json()["reason"]
        # Ray would have ended the process a minute after that.
        assert front.popen.poll() is None
        assert front.get("/health").status_code == 200
    finally:
        front.popen.kill()
        front.popen.wait(30)
        front.popen.stderr.close()
