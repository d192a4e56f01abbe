"""A made-up Ascend host: a file tree, scripted programs on PATH, and a Host that looks at nothing else."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.ascend.sized_host import SizedHost, matrix_of_today

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qvl.ascend.report import Finding

RECORDINGS = Path(__file__).parent / "recordings"


def recording(name: str) -> str:
    return (RECORDINGS / name).read_text(encoding="utf-8")


def of(findings: Iterable[Finding], check: str) -> list[Finding]:
    """The findings of one check, in order."""
    return [finding for finding in findings if finding.check == check]


class Machine:
    """Builds the tree step by step; `host()` looks at it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.bin = folder / "bin"
        self.site = folder / "site"
        self.calls = folder / "calls"
        for place in (self.root, self.bin, self.site, self.calls):
            place.mkdir()
        # Only what scripted programs need themselves; a real npu-smi or docker must not be found.
        for tool in ("bash", "sh", "cat", "env"):
            (self.bin / tool).symlink_to(shutil.which(tool) or "/bin/sh")
        self.environ: dict[str, str] = {"PATH": str(self.bin)}

    def write(self, absolute: str, text: str = "") -> Path:
        path = self.root / absolute.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def nodes(self, *numbers: int) -> None:
        for name in (*(f"davinci{number}" for number in numbers), "davinci_manager", "devmm_svm", "hisi_hdc", "shm/x"):
            self.write(f"/dev/{name}").chmod(0o660)

    def program(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def npu_smi(self, name: str, code: int = 0) -> None:
        self.program("npu-smi", f'cat "{RECORDINGS / name}"\nexit {code}')

    def package(self, name: str, version: str) -> None:
        folder = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")

    def replace_package(self, name: str, version: str) -> None:
        for folder in self.site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            shutil.rmtree(folder)
        self.package(name, version)

    def software(self, cann: str = "8.3.RC1", **packages: str) -> None:
        folder = "/usr/local/Ascend/ascend-toolkit/latest"
        text = recording("toolkit-8.3.RC1.install.info").replace("8.3.RC1", cann)
        self.write(f"{folder}/aarch64-linux/ascend_toolkit_install.info", text)
        self.write("/usr/local/Ascend/ascend-toolkit/set_env.sh")
        self.environ["ASCEND_HOME_PATH"] = folder
        for name, version in packages.items():
            self.package(name.replace("_", "-"), version)

    def host(self, **changes: object) -> SizedHost:
        facts: dict[str, object] = {
            "root": self.root,
            "environ": dict(self.environ),
            "site": (str(self.site),),
            "python_version": "3.11.9",
            "uid": os.geteuid(),
        }
        return SizedHost(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fresh_matrix() -> Iterator[None]:
    with matrix_of_today():
        yield


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def healthy(tmp_path: Path) -> Machine:
    """Four idle 910B4 with a driver, firmware, CANN and packages that go together."""
    return healthy_machine(tmp_path)


def healthy_machine(folder: Path) -> Machine:
    """Build the machine of the fixture `healthy` in a folder."""
    machine = Machine(folder)
    machine.nodes(0, 1, 2, 3)
    machine.npu_smi("24.1.rc3-910B4.txt")
    machine.write("/usr/local/Ascend/driver/version.info", recording("driver-24.1.rc3.version.info"))
    machine.write("/usr/local/Ascend/firmware/version.info", "Version=7.5.0.1.129\npackage_version=24.1.rc3\n")
    machine.software("8.3.RC1", torch="2.7.1+cpu", torch_npu="2.7.1", transformers="4.57.1")
    return machine
