from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

HERE = Path(__file__).parent


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """stdout, every line of which must be JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> str:
        """The one error line of stderr."""
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0]


def install(folder: Path, name: str, module: str) -> None:
    """A package in `folder` as pip would leave it: its metadata and the entry point of a qvl plugin."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[qvl]\n{name} = {module}\n")


@pytest.fixture(scope="session")
def plugin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "parrot.py", folder / "qvl_parrot.py")
    install(folder, "parrot", "qvl_parrot")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_folder: Path) -> Path:
    """A folder of its own to work in, a cache of its own, and the parrot installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(plugin_folder))
    monkeypatch.setenv("QVL_CACHE", f"sqlite:///{tmp_path / 'answers.db'}")
    monkeypatch.setenv("QVL_MODEL", "parrot:grey")
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def qvl() -> Callable[..., Ran]:
    """Runs the command in this process."""
    from qvl.cli import app

    def run(*args: str, stdin: bytes | None = None) -> Ran:
        found = CliRunner().invoke(app, list(args), input=stdin, prog_name="qvl")
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return Ran(found.exit_code, found.stdout, found.stderr)

    return run


@pytest.fixture
def process(plugin_folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command as a process of its own."""

    def start(*args: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qvl.cli", *args],
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(plugin_folder), **options.pop("env", {})},
            **options,
        )

    return start


@pytest.fixture
def shell(process: Callable[..., subprocess.Popen[str]]) -> Callable[..., Ran]:
    """Runs the command as a process of its own, to its end."""

    def run(*args: str, **options: Any) -> Ran:
        child = process(*args, **options)
        out, err = child.communicate(timeout=120)
        return Ran(child.returncode, out, err)

    return run


@pytest.fixture
def picture(folder: Path) -> str:
    return make_picture("mug.png", 64, 48)


@pytest.fixture
def pictures(folder: Path) -> list[str]:
    return [make_picture(f"shelf-{number}.png", 40 + number, 30) for number in range(5)]


def make_picture(name: str, width: int, height: int) -> str:
    Image.new("RGB", (width, height), "red").save(name)
    return name
