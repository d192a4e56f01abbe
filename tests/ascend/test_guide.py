"""What docs/ascend.md says of commands, versions, checks and variables is what qvl has; test_guide_run follows it."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.ascend import environment, matrix
from qvl.ascend.launch import docker_arguments
from qvl.ascend.recipe import ContainerPlan
from qvl.cli import load_command

if TYPE_CHECKING:
    from typer._click.core import Command

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
OWN = {"GRAFANA_PASSWORD", "USER"}


def commands(text: str = GUIDE, kind: str = "bash(?: other)?") -> list[str]:
    """The commands of the page; `bash other` are those for another host than the first."""
    found: list[str] = []
    for block in re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found


def cli(name: str) -> Command | None:
    """The parser of one qvl command, None where that command is not part of this version."""
    if importlib.util.find_spec(f"qvl.cli.{name}") is None:
        return None
    return load_command(name)


def parse(words: list[str]) -> None:
    """Raises where the command's own parser refuses the words; runs nothing."""
    command = cli(words[1])
    if command is None:
        pytest.skip(f"qvl {words[1]} is not part of this version")
    command.make_context(words[1], list(words[2:]))


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("qvl ")])
def test_qvl_commands_are_what_their_own_parser_takes(line: str) -> None:
    parse(shlex.split(line.split(" > ")[0]))


def test_a_misspelt_flag_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--prots"):
        parse(["qvl", "launch", "m", "--image", "a:1", "--prots", "1"])


def test_docker_flags_in_the_text_are_those_that_launch_writes_or_says_it_leaves_out() -> None:
    plan = ContainerPlan(model="m", image="a:1", npus=(0,), privileged=True)
    written = {word for word in docker_arguments(plan) if word.startswith("--")}
    table = GUIDE[GUIDE.index("What the container gets") : GUIDE.index("## 5.")]
    named = {flag.split("=")[0] for flag in re.findall(r"`(--[a-z-]+)", table)}

    assert named - {"--ipc"} <= written
    assert "--ipc" not in written


def test_commands_inside_containers_are_checked_too() -> None:
    inner = [found[1] for line in commands() if (found := re.search(r'bash -ic "(qvl .*)"', line))]

    assert inner
    for line in inner:
        parse(shlex.split(line.split(" > ")[0]))


def test_variables_are_those_that_the_doctor_knows() -> None:
    shape = r"\b(?:ASCEND|HCCL|ACL|PYTORCH|TORCH|TASK|QVL|VLLM|HF|GRAFANA)_[A-Z_]+\b"
    named = {name for name in re.findall(shape, GUIDE) if not name.endswith("_")}

    assert len(named) > 8
    assert named - OWN <= environment.KNOWN


def test_the_table_of_versions_is_the_matrix() -> None:
    rows = re.findall(r"^\| (0\.\d+\.\d+) \|(.*)\|(.*)\|(.*)\|(.*)\|$", GUIDE, re.MULTILINE)
    known = matrix.load().vllm_ascend
    columns = ("vllm", "cann", "torch", "torch_npu")

    assert {version: tuple(cell.strip() for cell in cells) for version, *cells in rows} == {
        version: tuple(str(row.get(column, "not known")) for column in columns)
        for version, row in known.items()
        if re.fullmatch(r"[\d.]+", version)
    }


def test_the_table_of_checks_has_every_check_and_no_other() -> None:
    section = GUIDE[GUIDE.index("## What the doctor looks at") : GUIDE.index("## Environment")]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([a-z-]+)`", cell)}
    written = {
        call.args[0].value
        for path in (ROOT / "src/qvl/ascend").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).partition(".")[0] == "Finding"
        if call.args and isinstance(call.args[0], ast.Constant)
    }

    probed = {f"endpoint-{name}" for name in ("exif", "alpha", "tokens", "template", "end", "repeats")}
    assert listed == written | probed | {"endpoint-schema", "endpoint-pixels"}


def test_checks_named_in_the_text_are_in_the_table() -> None:
    section = GUIDE[GUIDE.index("## Troubleshooting") :]
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", section)) - {"unless-stopped", "allkeys-lru", "npu-smi-info"}
    table = GUIDE[GUIDE.index("## What the doctor looks at") : GUIDE.index("## Environment")]

    assert named
    assert all(f"`{name}`" in table for name in named), named


def test_files_and_anchors_named_in_the_text_exist() -> None:
    for path in re.findall(r"\bdeploy/(?:Dockerfile|compose|helm)\b", GUIDE):
        assert (ROOT / path).exists()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in GUIDE.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", GUIDE):
        assert anchor in headings
