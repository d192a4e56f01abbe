"""Ctrl-C while a model is being loaded ends the program, and nothing that still loads keeps it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("torch")

SCRIPT = """
import sys
from qvl import Pipeline
try:
    with Pipeline("some/model", cache="off") as pipe:
        pipe.ask(sys.argv[1], "what?")
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.fixture
def hub() -> Iterator[socket.socket]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("way", ["qvl", "qvl-serve", pytest.param("python", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_ctrl_c_while_a_model_loads_ends_the_program(hub: socket.socket, tmp_path: Path, way: str) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    qvl = [sys.executable, "-m", "qvl.cli", "ask", str(picture), "what?", "--model", "some/model", "--cache", "off"]
    serve = [sys.executable, "-m", "qvl.cli.serve", "some/model", "--port", "0", "--cache", "off"]
    command = {"qvl": qvl, "qvl-serve": serve, "python": [sys.executable, "-c", SCRIPT, str(picture)]}[way]
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
        "HF_HUB_ETAG_TIMEOUT": "600",
        "HF_HUB_DOWNLOAD_TIMEOUT": "600",
        "HF_HUB_OFFLINE": "0",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        connection, _ = hub.accept()
        process.send_signal(signal.SIGINT)
        # Far less than the hub would be waited for.
        out, err = process.communicate(timeout=60)
        connection.close()
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert ("interrupted" in out) == (way == "python")
