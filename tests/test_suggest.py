"""What a user is told to install works from where they are, and README tells the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from qvl import suggest

ROOT = Path(__file__).parents[1]
DECLARED = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
BRACKETS = r"\[([a-z]+(?:,[a-z]+)*)\](?!\()"
# Only what the line itself says is tried: nothing is fetched, nothing is installed.
DRY = {"PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **DRY, "PATH": path}
    return subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_in_a_clone_the_line_names_the_dot_and_elsewhere_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert shlex.split(suggest.install_line("local", "ray"))[-1] == ".[local,ray]"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(suggest.install_line("local"))[-1] == f"{ROOT}[local]"


def test_the_line_calls_the_pip_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    assert suggest.install_line("local").startswith("pip install ")
    (tmp_path / "pip").write_text("#!/bin/sh\n")
    (tmp_path / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert suggest.install_line("local").startswith(f"{sys.executable} -m pip install ")


def test_the_line_installs_qvl_with_that_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # Without -e, which wants one more package for building.
    done = shell(suggest.install_line("bench").replace(" -e ", " "), tmp_path)
    assert "Would install qvl-" in done.stdout, done.stderr


def test_an_installation_without_its_clone_is_named_qvl(tmp_path: Path) -> None:
    """As a wheel from an index leaves it: a folder of packages, and no word of where it came from."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    (site / "qvl").mkdir()
    for name in ("suggest.py", "_version.py"):
        (site / "qvl" / name).write_bytes((ROOT / "src" / "qvl" / name).read_bytes())
    (site / "qvl" / "__init__.py").write_text("")
    code = "from qvl.suggest import install_line; print(install_line('local'))"
    told = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path, timeout=60)
    assert told.strip().endswith("install 'qvl[local]'")


def test_every_extra_that_is_named_anywhere_is_declared() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.ipynb")]
    named = {
        extra
        for path in texts
        for install in re.findall(rf"(?:`|\}}|'\.|qvl){BRACKETS}", path.read_text(encoding="utf-8"))
        for extra in install.split(",")
    }
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    asked = {extra for call in re.findall(r"install_line\(([^)]*)\)", source) for extra in re.findall(r'"(\w+)"', call)}
    assert {"local", "server", "agent", "ray", "all"} <= named
    assert {"local", "npu", "redis"} <= asked
    assert named | asked <= DECLARED


@pytest.mark.slow
def test_the_install_lines_of_readme_work_in_an_empty_folder(tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    where, *installs = [line for line in lines if line.startswith(("QVL=", "pip install"))]
    assert len(installs) >= 4
    told = shell(f"{where}\ncd {tmp_path}\n" + "\n".join(installs[:2]), ROOT)
    assert told.stdout.count("Would install qvl-") == 2, told.stderr
    assert {re.sub(BRACKETS, "[…]", line) for line in installs} == {'pip install "${QVL}[…]"'}
