"""What reaches the terminal: no command of others, every letter, and no traceback where a stream is closed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qvl import log

from .conftest import make_picture

EVIL = "M\x1b]0;owned\x07\x1b[31mug\x9b2J\x7f\u202exyz\u2066\r!"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def sh(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What `command` does in a shell that knows `qvl`, without a terminal."""
    own = f'qvl() {{ "{sys.executable}" -m qvl.cli "$@"; }}; {command}'
    return subprocess.run(["sh", "-c", own], capture_output=True, env={**os.environ, **environment}, timeout=120)


@pytest.fixture
def catalog(tmp_path: Path) -> str:
    path = tmp_path / "shop.jsonl"
    rows = [
        {"id": "1", "name": EVIL, "brand": EVIL, "price": 3},
        {"id": f"2{EVIL}", "name": "mug", "price": "x" + EVIL},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return shlex.quote(str(path))


def test_a_catalogue_does_not_command_the_terminal(catalog: str) -> None:
    for options in ("--all", "--search xyz", "--search xyz --json", "--all --json", "--search mug -v"):
        done = sh(f"qvl agent -c {catalog} {options}")
        assert done.returncode == 0, done.stderr
        shown = (done.stdout + done.stderr).decode()
        assert "xyz" in shown
        assert not OBEYED.search(shown), options
        if "--json" in options:
            (row,) = map(json.loads, done.stdout.decode().splitlines())
            assert row["name"] == " ".join(EVIL.split())


@pytest.mark.slow
def test_names_of_files_do_not_command_the_terminal(tmp_path: Path) -> None:
    name = f"{tmp_path}/a\x1b[31m\x9bb\u202e.png"
    os.rename(make_picture(str(tmp_path / "a.png"), 64, 64), name)
    shown = sh(
        f"cd / && qvl analyze {shlex.quote(name)} --cache off; qvl analyze {shlex.quote(name)}.none --cache off",
        QVL_MODEL="",
    )
    assert b"a?[31m" in shown.stdout + shown.stderr
    assert not OBEYED.search((shown.stdout + shown.stderr).decode())


@pytest.mark.parametrize("as_json", [False, True])
def test_log_lines_do_not_command_the_terminal(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(level="info", json=as_json)
    log.logger("qvl.test").warning("strange", said=EVIL.replace(" ", ""))
    shown = capsys.readouterr().err
    assert "xyz" in shown
    assert not OBEYED.search(shown)


@pytest.mark.parametrize("command", ["version", "cache stats", "agent --all", "--help", "nonsense"])
@pytest.mark.parametrize("closed", [pytest.param(">&-", marks=pytest.mark.slow), ">&- 2>&- <&-"])
def test_a_closed_stream_ends_no_command_in_a_traceback(command: str, closed: str) -> None:
    done = sh(f"qvl {command} {closed}")
    assert done.returncode == (2 if command == "nonsense" else 0)
    assert b"Traceback" not in done.stdout + done.stderr
    assert (done.stdout == b"") or ">&-" not in closed.split()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ({"PYTHONIOENCODING": "latin-1:strict"}, {"LC_ALL": "C"}, {"LANG": "C"})
        ),
    ],
)
def test_letters_that_stdout_cannot_write_are_escaped(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("id,name,price\n1,Größe 红 😀,3\n")
    table = sh(f"qvl agent -c {tmp_path}/shop.csv --all; qvl agent -c {tmp_path}/shop.csv --search 蓝", **environment)
    assert (table.returncode, b"Traceback" in table.stderr) == (0, False)
    rows = sh(f"qvl agent -c {tmp_path}/shop.csv --all --json", **environment)
    assert json.loads(rows.stdout)["name"] == "Größe 红 😀"


def test_nothing_opened_later_takes_the_place_of_a_closed_stdout(tmp_path: Path) -> None:
    kept = tmp_path / "kept.db"
    sh(f"qvl cache stats --cache {kept} >&-")
    sh(f"qvl agent --all --index {kept} >&-")
    assert sh(f"qvl agent --search mug --index {kept}").returncode == 0
