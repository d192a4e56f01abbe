"""The commands of docs/parity.md as they stand, with a server in place of the NPU host."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from qvl.backends.local.backend import LocalBackend
from qvl.cli import app
from tests.server.conftest import start

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^ *```bash\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in fenced for line in block.splitlines()]


@pytest.mark.slow
def test_the_migration_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = ROOT / "examples" / "pictures"
    shutil.copytree(pictures, tmp_path / "shop")
    monkeypatch.chdir(tmp_path)
    # The other chip: the same weights in another precision.
    running = start(LocalBackend(device="cpu", dtype="bfloat16"))
    told = commands()
    assert len(told) == 5
    outputs = []
    try:
        for command in told:
            words = shlex.split(command.replace("http://npu-host:8000", running.url))
            done = CliRunner().invoke(app, words[1:])
            outputs.append(done.output)
            assert done.exit_code in (0, 2), (command, done.output)
            assert "error: " not in done.output
    finally:
        running.stop()
    assert "first layer that parts: log-probabilities" in outputs[2]
    # Which one is guessed, since the server does not tell, and what the processor's instructions are has a say in it.
    assert re.search(r"cause(?: \(likely\))?: .* \[log-probabilities\]", " ".join(outputs[2].split()))
    assert "budget field.brand=0.5: within" in outputs[3]
    assert "is allowed: within" in outputs[4]
    suite = ElementTree.parse(tmp_path / "parity.xml").getroot()
    assert [test.get("name") for test in suite] == ["text", "field.brand", "kl"]
    page = (tmp_path / "parity.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    assert "The cases that part the most" in page
