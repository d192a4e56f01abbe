"""Commands of qvl in processes of their own, with a fault planted in them where one is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.processes import Process


def command(*words: str, faults: str = "") -> list[str]:
    program = ["tests.parity.faulty", faults] if faults else []
    return [sys.executable, "-m", *program, *words]


@contextmanager
def served(faults: str = "", *more: str) -> Iterator[str]:
    """A server of the bundled model in float32, named as side B of the command."""
    words = command(
        "qvl.cli.serve", "--port", "0", "--device", "cpu", "--option", "dtype=float32", *more, faults=faults
    )
    process = Process(subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)).wait_ready()
    try:
        yield f"openai:bundled,base_url={process.address}/v1,api_key=x"
    finally:
        process.end()
