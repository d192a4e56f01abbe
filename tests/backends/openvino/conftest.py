"""OpenVINO GenAI on converted models. Run by `make test-openvino`; elsewhere these tests are skipped as a whole."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.openvino.backend import OpenVinoBackend
from tests.backends.token_engines import mark

# What leaves no room for rounding, so that answers can be compared with those of the local backend.
EXACT: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "float32"}
Export = Callable[[Path, str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(
        items,
        Path(__file__).parent,
        "openvino",
        ("openvino_genai", "optimum"),
        "OpenVINO GenAI is not installed: make test-openvino",
    )


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Converts a checkpoint by optimum-intel's command, as the README tells a user to."""

    def run(checkpoint: Path, weight_format: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{checkpoint.name}-{weight_format}")
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
        command += ["--task", "image-text-to-text", "--weight-format", weight_format, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="session")
def exported(export: Export) -> Path:
    """The bundled model in OpenVINO's form, its weights as they are."""
    from qvl.backends.local.model.model_folder import bundled_folder

    return export(bundled_folder(), "fp16")


@pytest.fixture(scope="module")
def engine(loop: asyncio.AbstractEventLoop, exported: Path) -> Iterator[OpenVinoBackend]:
    """One open engine for all tests of a module."""
    backend = OpenVinoBackend(str(exported), **EXACT)
    loop.run_until_complete(backend.open())
    yield backend
    loop.run_until_complete(backend.aclose())
