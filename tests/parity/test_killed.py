"""500 cases against two servers in bounded memory, killed in the middle and begun again: what is missing is asked."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import pytest
from PIL import Image

from tests.server.conftest import Running, start
from tests.server.echo_backend import EchoBackend

CASES = 500
AT_ONCE = 8


def questions(running: Running) -> Counter[str]:
    asked = [request.messages[-1].text for request in running.backend.requests]
    return Counter(text for text in asked if text.startswith("Question "))


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [json.dumps(f"Question {number}?") for number in range(CASES)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    a, b = start(EchoBackend(), cache="off"), start(EchoBackend(), cache="off")
    try:
        urls = [f"openai:echo-vl,base_url={running.url}/v1,api_key=x" for running in (a, b)]
        asked = ["--pictures", str(tmp_path / "red.png"), "--questions", str(tmp_path / "questions.jsonl")]
        command = [sys.executable, "-m", "qvl.cli", "parity", *urls, *asked, "-j", str(AT_ONCE), "--json"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
        while sum(questions(b).values()) < CASES // 3:
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()
        run.wait()
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["cases"] == CASES
        assert report["agreement"]["text"]["agree"] == CASES
        # A was asked to the end before; of B again only what was under way.
        assert questions(a) == Counter({f"Question {number}?": 1 for number in range(CASES)})
        again = [text for text, count in questions(b).items() if count > 1]
        assert len(questions(b)) == CASES
        assert len(again) <= AT_ONCE
        # What ended begins anew.
        subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
        assert all(count >= 2 for count in questions(a).values())
    finally:
        a.stop()
        b.stop()


def peak(command: list[str], folder: Path) -> int:
    """The most memory that the command had, in KiB; wait4 would tell at least that of this process."""
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    most = 0
    while run.poll() is None:
        if told := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{run.pid}/status").read_text()):
            most = int(told[1])
        time.sleep(0.05)
    assert run.returncode == 0
    return most


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_five_hundred_cases_take_the_memory_of_a_hundred(tmp_path: Path) -> None:
    """Each case has a picture of its own, of 300 KB; those of 400 more cases would be 120 MB."""
    dice = random.Random(0)
    for number in range(CASES):
        image = Image.frombytes("RGB", (320, 320), dice.randbytes(320 * 320 * 3))
        image.save(tmp_path / f"{number:03}.png", compress_level=0)
    a, b = start(EchoBackend(), cache="off"), start(EchoBackend(), cache="off")
    for running in (a, b):
        # Its pictures are not kept here either.
        running.backend.requests = deque(maxlen=1)
    try:
        urls = [f"openai:echo-vl,base_url={running.url}/v1,api_key=x" for running in (a, b)]
        qvl = [sys.executable, "-m", "qvl.cli", "parity", *urls, "-q", "What?", "-j", str(AT_ONCE), "--pictures"]
        few, many = (peak([*qvl, str(tmp_path / f"{name}.png")], tmp_path) for name in ("0*", "*"))
        print(f"peak memory of 100 cases and of {CASES}: {few // 1024} and {many // 1024} MiB")
        assert many < few + (32 << 10)
    finally:
        a.stop()
        b.stop()
