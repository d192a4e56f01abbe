from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `workers.py` in a process of its own; those still alive at the end are killed."""
    started: list[subprocess.Popen[str]] = []

    def run(task: str, url: str, *arguments: object, user: int | None = None) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("workers.py")
        command = [sys.executable, str(script), task, "-" if user is None else str(user), url, *map(str, arguments)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=script.parent
        )
        started.append(child)
        return child

    yield run
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()
