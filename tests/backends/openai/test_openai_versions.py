"""The openai backend on the last major version of the openai package: the same promises, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What goes through the package: connections, TLS, headers, errors in every shape, streams cut off, probing.
ESSENTIAL = "TestAnswer or TestProbe or TestForeignErrors or TestRetries or TestErrorBodies or TestNoConnection"


@pytest.mark.slow
def test_the_essential_promises_hold_on_the_last_major(last_major: str) -> None:
    tests = [str(HERE / name) for name in ("test_openai.py", "test_faults.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", ESSENTIAL, *tests]
    environment = {**os.environ, "PYTHONPATH": last_major}
    asked = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    assert subprocess.check_output(asked, text=True, env=environment).startswith("2.")
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, env=environment, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
