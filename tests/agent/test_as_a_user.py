"""What a person at a terminal sees, with the model that comes along, in real processes."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MUG = "examples/pictures/norvik-mug-red.png"
pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QVL_", "VISION_"))}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "COLUMNS": "120"}


def run(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_second_run_of_a_picture_needs_no_inference(environment: dict[str, str], tmp_path: Path) -> None:
    cache = f"sqlite:///{tmp_path / 'answers.db'}"
    done = run(environment, "-m", "qvl.cli", "agent", "-f", MUG, "-q", "under 100", "-i", "2", "--cache", cache)
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stdout.splitlines() if line.startswith("run "))
    assert re.fullmatch(r"run 1: [\d.]+ ms, 1 inference", first)
    assert re.fullmatch(r"run 2: [\d.]+ ms, no inference, \d+ x faster than the first", second)
    assert "Norvik Cima 500 (10.90 EUR, MU-0001)" in done.stdout
    assert "does not write" in done.stdout
    # The next process finds the answer too, and has no need of the model's weights.
    done = run(environment, "-m", "qvl.cli", "agent", "-f", MUG, "--json", "-v", "--cache", cache)
    *events, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert next(line["event"]["data"]["cache"] for line in events if line["event"]["kind"] == "end") == "hit"
    assert last["recommendation"]["products"][0]["product"]["id"] == "MU-0001"


def test_a_picture_of_no_product_recommends_nothing(environment: dict[str, str]) -> None:
    done = run(environment, "-m", "qvl.cli", "agent", "-f", "examples/pictures/no-product.png", "--cache", "off")
    assert done.returncode == 0, done.stderr
    assert "no product that could be recognised, so nothing is recommended" in done.stdout
    assert "EUR" not in done.stdout


def test_the_demo_shows_every_scenario_and_explains_itself(environment: dict[str, str]) -> None:
    script = "examples/agent_chain_demo.py"
    done = run(environment, script, "--all", "-f", MUG, "-i", "2")
    assert done.returncode == 0, done.stderr
    for said in (
        "The search alone, without a model",
        "The chain: analyze the picture",
        "A follow-up in the same thread",
    ):
        assert said in done.stdout
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines() if line.startswith("run ")] == ["1", "no"]
    assert "The picture shows NORVIK mug" in done.stdout
    assert "I look at a product's picture" in done.stdout
    done = run(environment, script, "--search", "NORVIK")
    assert "brand is NORVIK" in done.stdout
    assert done.stderr == ""
    helped = run(environment, script, "--help").stdout
    assert all(option in helped for option in ("-f ", "-i ", "--chat", "--search", "--all"))
    assert run(environment, script, "-i", "0").returncode == 2


def test_the_demo_talks_and_a_wrong_picture_is_one_line(environment: dict[str, str]) -> None:
    command = [sys.executable, "examples/agent_chain_demo.py", "--chat"]
    lines = f"cheaper ones?\nwhat can you do?\n{MUG} in blue\ncheaper ones?\nlost.png\nquit\n"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=lines, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0
    assert done.stdout.count("EUR, MU-") >= 2
    assert [line[:22] for line in done.stderr.splitlines() if "error" in line] == [
        "error: no picture yet ", "error: analyze failed:"
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_on_a_terminal_the_tree_grows_and_a_failure_is_said_once(environment: dict[str, str]) -> None:
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "qvl.cli", "agent", "-f", MUG, "--cache", "off", "-m", "openai:none"]
    command += ["--base-url", "http://127.0.0.1:9/v1", "-O", "max_retries=0", "-O", "total_timeout=20"]
    child = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "TERM": "xterm-256color"}, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    seen = b""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if not select.select([master], [], [], 1.0)[0]:
            continue
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    assert child.wait(30) == 1
    text = seen.decode()
    assert "… model: look at the picture" in text
    assert "✗ model: look at the picture" in text
    last = text[text.rindex("user:") :]
    assert last.count("cannot connect") == 1, last
