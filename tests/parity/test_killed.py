"""500 cases against two servers, killed in the middle and begun again: only what is missing is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
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
