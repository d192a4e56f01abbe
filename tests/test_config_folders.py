"""A user without a home, as a bare number in a container is, can do all that needs none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.caches.sqlite import SqliteCache, default_path
from qvl.config import config_path

HOMES = {"unset": None, "empty": "", "relative": "somewhere"}


def strip(environment: dict[str, str], home: str | None) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name != "HOME" and not name.startswith("XDG_")}
    return kept if home is None else {**kept, "HOME": home}


def as_nobody(*command: str, home: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it as a user whose number no list of users has."""
    who = ["unshare", "--user", "--map-user=54321", "--"]
    if shutil.which(who[0]) is None or subprocess.run([*who, "true"], capture_output=True, check=False).returncode:
        pytest.skip("users cannot be mapped here")
    return subprocess.run(
        [*who, sys.executable, *command],
        cwd=folder,
        env=strip(dict(os.environ), home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("home", HOMES.values(), ids=HOMES)
def test_the_folders_of_a_user_without_a_home_are_absolute(home: str | None, tmp_path: Path) -> None:
    code = "from qvl import config; from qvl.caches import sqlite; print(config.config_path(), sqlite.default_path())"
    told = as_nobody("-c", code, home=home, folder=tmp_path)
    assert told.stdout.split() == ["/.config/qvl/config.toml", "/.cache/qvl/cache.db"], told.stderr
    assert list(tmp_path.iterdir()) == []


def test_with_a_home_they_lie_in_it() -> None:
    assert {config_path().parents[2], default_path().parents[2]} == {Path(os.environ["HOME"])}


@pytest.mark.parametrize("home", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize("command", [("plugins",), ("models",), ("cache", "stats")], ids=" ".join)
def test_commands_work_without_a_home(command: tuple[str, ...], home: str | None, tmp_path: Path) -> None:
    told = as_nobody("-m", "qvl.cli", *command, home=home, folder=tmp_path)
    assert (told.returncode, "Traceback" in told.stderr) == (0, False), told.stderr


def test_launch_says_that_there_is_no_home_to_mount(tmp_path: Path) -> None:
    command = ("-m", "qvl.cli", "launch", "Qwen/Qwen3-VL-2B-Instruct", "--image", "qvl-npu:0.1.0", "--dry-run")
    told = as_nobody(*command, home=None, folder=tmp_path)
    assert told.returncode == 2
    assert told.stderr == "qvl launch: ~/.cache cannot be resolved: this user has no home (--hub-cache FOLDER)\n"


def test_a_home_that_nobody_has_is_a_name_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-such-user").mkdir()
    with SqliteCache("~no-such-user/answers.db") as cache:
        assert cache.url.endswith(f"{tmp_path}/~no-such-user/answers.db")
