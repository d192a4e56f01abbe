"""The Host: programs that are missing or hang, files that are not there, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from qvl.ascend.host import Host

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine


def test_a_missing_program_is_code_127_and_a_hanging_one_124(machine: Machine) -> None:
    machine.program("hangs", "while :; do :; done")

    missing = machine.host().run(["no-such-program"])
    hanging = machine.host().run(["hangs"], timeout=0.2)

    assert (missing.code, hanging.code) == (127, 124)
    assert "not found" in missing.last_line
    assert "timed out" in hanging.last_line


def test_a_program_that_cannot_be_run_is_no_exception(machine: Machine) -> None:
    path = machine.bin / "broken"
    path.write_bytes(b"\x7fELF nonsense")
    path.chmod(0o755)

    assert machine.host().run(["broken"]).code == 126


def test_the_last_line_is_the_reason(machine: Machine) -> None:
    machine.program("fails", "echo out; echo first >&2; echo; echo the reason >&2; exit 3")

    done = machine.host().run(["fails"])

    assert (done.code, done.last_line) == (3, "the reason")


def test_files_and_folders_below_the_root_only(machine: Machine) -> None:
    machine.write("/etc/thing", "inside")
    host = machine.host()

    assert host.read("/etc/thing") == "inside"
    assert host.read("/etc/passwd") is None
    assert host.names("/nothing") == ()
    assert host.names("/etc") == ("thing",)


def test_packages_are_found_under_their_normal_name(machine: Machine) -> None:
    machine.package("Torch_NPU", "2.7.1")

    assert machine.host().packages() == {"torch-npu": "2.7.1"}
    assert "typer" in Host().packages()


def test_the_commands_are_light_to_import() -> None:
    heavy = "{'torch', 'httpx', 'transformers', 'redis', 'PIL', 'rich.console', 'qvl.ascend.doctor'}"
    code = f"import sys, qvl.cli.doctor, qvl.cli.launch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
