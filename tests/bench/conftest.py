from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from qvl.bench.dataset import Files
from qvl.bench.plan import LoadPlan
from qvl.bench.record import RequestRecord, read_records
from qvl.bench.run import Run, Target
from qvl.bench.summary import Summary
from qvl.cli import app
from tests.scripted_endpoint import ScriptedEndpoint


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as started:
        yield started


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (96, 64), (205, 30, 35)).save(path)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes values as a JSONL file; strings go in as they are."""

    def write(*values: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Summary]:
    """A run over a file, from Python."""

    def run(data: Path, *endpoints: ScriptedEndpoint, out: str = "run", resume: bool = False, **plan: Any) -> Summary:
        target = Target(tuple(held.url for held in endpoints))
        return Run(target, Files([str(data)]), LoadPlan(**plan), tmp_path / out, resume=resume).work()

    return run


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., list[RequestRecord]]:
    return lambda out="run": list(read_records(tmp_path / out / "results.jsonl"))


@pytest.fixture
def bench() -> Callable[..., Any]:
    """`qvl bench` with these arguments."""
    return lambda *arguments: CliRunner().invoke(app, ["bench", *map(str, arguments)])
