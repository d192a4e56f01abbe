"""OpenAI's client of this and of the last major version, over the echo and over the bundled model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.server.conftest import Running, picture

ROOT = Path(__file__).parents[2]
MUG = ROOT / "examples" / "pictures" / "norvik-mug-red.png"


def scenarios(url: str, model: str, file: Path, word: str, folder: str | None = None) -> str:
    script = Path(__file__).with_name("client_scenarios.py")
    env = {**os.environ, "NO_PROXY": "127.0.0.1"} | ({"PYTHONPATH": folder} if folder else {})
    done = subprocess.run(
        [sys.executable, str(script), f"{url}/v1", model, str(file), word],
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def red(tmp_path: Path) -> Path:
    file = tmp_path / "red.png"
    file.write_bytes(picture("red"))
    return file


def test_this_major_over_the_echo(server: Running, red: Path) -> None:
    said = scenarios(server.url, "echo-vl", red, "red")
    assert said.startswith(f"openai {openai.__version__}:")


@pytest.mark.slow
def test_the_last_major_over_the_echo(server: Running, red: Path, last_major: str) -> None:
    assert scenarios(server.url, "echo-vl", red, "red", last_major).startswith("openai 2.")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_majors_over_the_bundled_model(run, last_major: str) -> None:
    process = run("--cache", "memory:").wait_ready()
    assert scenarios(process.address, "bundled", MUG, "norvik").startswith(f"openai {openai.__version__}:")
    assert scenarios(process.address, "bundled", MUG, "norvik", last_major).startswith("openai 2.")
