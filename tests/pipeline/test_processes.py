"""What holds between processes: the cache is the checkpoint, and one inference serves them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
from qvl import Pipeline
from tests.pipeline.conftest import TalkingBackend, answer_json

cache, log, pause, *pictures = sys.argv[1:]

def reply(request):
    with open(log, "a") as out:
        out.write("asked\\n")
    time.sleep(float(pause))
    return answer_json()

with Pipeline(backend=TalkingBackend(reply=reply), cache=f"sqlite:///{cache}", concurrency=1) as pipe:
    for item in pipe.map(pictures):
        print(item.index, item.value.brand, flush=True)
"""


def start(tmp_path: Path, pause: float, pictures: list[str]) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "cache.db"), str(tmp_path / "log"), str(pause), *pictures]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def asked(tmp_path: Path) -> int:
    return (tmp_path / "log").read_text().count("asked")


def test_a_killed_map_goes_on_where_it_stopped(tmp_path: Path, pictures: list[str]) -> None:
    first = start(tmp_path, 0.3, pictures)
    assert first.stdout is not None
    for _ in range(4):
        first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    before = asked(tmp_path)
    assert 4 <= before < len(pictures)
    second = start(tmp_path, 0, pictures)
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0
    assert len(out.splitlines()) == len(pictures)
    assert asked(tmp_path) <= len(pictures) + 1


@pytest.mark.slow
def test_processes_share_one_inference(tmp_path: Path, pictures: list[str]) -> None:
    running = [start(tmp_path, 1.0, pictures[:1]) for _ in range(8)]
    for process in running:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        assert out == "0 NORVIK\n"
    assert asked(tmp_path) == 1
