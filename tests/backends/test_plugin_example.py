"""The example of a third-party backend: installed by pip, found by qvl, held to the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin_backend"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed beside qvl."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", str(target), str(EXAMPLE)], check=True, timeout=240)
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_appears_among_the_plugins(installed: dict[str, str]) -> None:
    assert "palette" in run(installed, "-m", "qvl.cli", "plugins")


def test_a_pipeline_finds_it_by_name(installed: dict[str, str]) -> None:
    code = (
        "from qvl import Pipeline; from PIL import Image\n"
        "with Pipeline('palette:16', cache='off') as pipe:\n"
        "    print(pipe.ask(Image.new('RGB', (64, 64), (220, 40, 40)), 'Which?').text)"
    )
    assert run(installed, "-c", code).strip() == "picture 1: red asked: Which?"


def test_it_holds_the_contract(installed: dict[str, str]) -> None:
    out = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE))
    assert " passed" in out
