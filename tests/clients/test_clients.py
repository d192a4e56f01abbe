"""Real clients, each in an environment of its own, against a real `qvl-serve` with the bundled model.

What they could do is a table of README, which is checked here: `make test-clients WRITE=1` writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.environments import CLIENTS, FEATURES, FOLDER, ROOT, Client, command
from tests.conftest import AS_FOUND
from tests.server.processes import Process, launch

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1500)]
PICTURE = ROOT / "examples" / "pictures" / "norvik-mug-red.png"
README = ROOT / "README.md"
FOUND: dict[Client, str] = {}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process: Process = launch("--cache", "memory:")
    yield process.wait_ready().address
    process.end()


def _id(client: Client) -> str:
    return f"{client.environment}-{client.program.partition('.')[0]}"


@pytest.mark.parametrize("client", CLIENTS, ids=_id)
def test_a_client_finds_what_it_knows(client: Client, address: str, tmp_path: Path) -> None:
    if client.environment == "node" and shutil.which("npm") is None:
        pytest.fail("there is no npm here: apt-get install nodejs npm")
    line = command(client, address, "bundled", PICTURE)
    # Nothing of this process's settings: a client finds its server by what its program says.
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=FOLDER / client.environment, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.rstrip().rsplit("\n", 1)[-1])
    failed = {name: text for name, text in told["results"].items() if text != "ok"}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
    assert tuple(told["results"]) == client.features
    FOUND[client] = told["version"]


def table() -> str:
    """The table of what was found, in the order of the clients."""
    rows = [("client", "version", "over", *FEATURES), ("---",) * (3 + len(FEATURES))]
    for client, version in sorted(FOUND.items(), key=lambda item: CLIENTS.index(item[0])):
        marks = ["yes" if feature in client.features else "-" for feature in FEATURES]
        rows.append((client.name, version, client.api, *marks))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_readme_tells_what_was_found() -> None:
    if len(FOUND) < len(CLIENTS):
        pytest.skip("not every client was asked")
    text = README.read_text(encoding="utf-8")
    before, found, after = text.partition("\n| client |")
    _, behind, rest = after.partition("\n\n")
    written = before + "\n" + table().rstrip("\n") + behind + rest
    if AS_FOUND.get("QVL_WRITE_CLIENTS"):
        README.write_text(written, encoding="utf-8")
    assert found
    assert README.read_text(encoding="utf-8") == written
