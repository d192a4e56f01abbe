"""What CONTRIBUTING.md says of adding a thing holds: its files exist, and what is added by its words works."""

from __future__ import annotations

import importlib.machinery
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import qvl
from qvl import cli
from qvl.ascend import doctor
from qvl.ascend.host import Host
from qvl.ascend.report import Finding
from qvl.errors import ConfigError

PACKAGE = Path(qvl.__file__).parent
ROOT = PACKAGE.parents[1]


def rows() -> dict[str, list[str]]:
    """Return what the table calls each thing, and the three cells of its row."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## I want to add")[2]
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| a ")]
    return {cells[0]: cells for cells in lines}


@pytest.mark.parametrize("thing", rows())
def test_every_file_that_a_row_names_exists_and_one_shows_it(thing: str) -> None:
    _, touch, shown_by = rows()[thing]
    for name in re.findall(r"`([\w/.-]+(?:/|\.py|\.md))`", f"{touch} {shown_by}"):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name
    assert re.search(r"`(?:tests|examples)/[^`]+`", shown_by), "a test or an example shows it"


def test_the_table_says_how_to_add_what_is_added_most() -> None:
    things = {"backend", "cache", "model family", "route", "sampling parameter", "command", "check of the doctor"}
    assert {f"a {thing}" for thing in things} <= rows().keys()


def test_a_command_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(name: str) -> None:
        if name == "nobody":
            raise ConfigError("nobody cannot be greeted", hint="name somebody")
        typer.echo(f"hello {name}")

    module = types.ModuleType("qvl.cli.greet")
    module.greet = greet  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("qvl.cli.greet", None)
    monkeypatch.setitem(sys.modules, "qvl.cli.greet", module)
    monkeypatch.setitem(cli.COMMANDS, "greet", "Say hello.")
    group = cli.LazyGroup(name="qvl")
    assert "greet" in group.list_commands(None)
    outcomes = []
    for name in ("Ann", "nobody"):
        with pytest.raises(SystemExit) as ended:
            group.main(["greet", name], prog_name="qvl")
        outcomes.append(ended.value.code)
    assert outcomes == [0, 2]


def test_a_check_of_the_doctor_is_a_generator_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def moon(host: Host) -> Iterator[Finding]:
        yield Finding.warn("moon", "it is full", "wait two weeks")

    plan = doctor._plan
    monkeypatch.setattr(doctor, "_plan", lambda host, *rest: [*plan(host, *rest), ("moon", lambda: moon(host))])
    report = doctor.examine(Host(), doctor.Options(device="cpu", probe=False, software=False))
    assert [finding.summary for finding in report.findings if finding.check == "moon"] == ["it is full"]
