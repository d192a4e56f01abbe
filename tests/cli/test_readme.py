"""What README tells a newcomer to type exists and works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qvl.cli import LazyGroup, load_command

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [
    line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.startswith("qvl ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_is_one(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, name, *rest = shlex.split(line)
    assert name in LazyGroup(name="qvl").list_commands(None)
    command = load_command(name)
    inner = getattr(command, "commands", {})
    if inner:
        # `qvl bench --url …` is `qvl bench run --url …`.
        command, rest = (inner["run"], rest) if rest[0].startswith("-") else (inner[rest[0]], rest[1:])
    parameters = {option: parameter for parameter in command.params for option in parameter.opts}
    words = iter(rest)
    for word in words:
        if re.match(r"-{1,2}[a-z]", word):
            assert word in parameters
            if not parameters[word].is_flag:
                next(words)
    for word in rest:
        if word.startswith("examples/"):
            assert list(ROOT.glob(word)), word


def test_make_has_the_targets_that_are_named():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE))
    assert named == {"demo", "test"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_tour_in_python_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), scope)
    scope["pipe"].close()  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    assert "NORVIK mug" in printed
    assert "What color is it? miss" in printed
    assert "no such file: lost.png" in printed
