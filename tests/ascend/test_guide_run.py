"""docs/ascend.md, followed from the top: every command is run, in order, on a made-up host, and must succeed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qvl.ascend import matrix
from tests.ascend.conftest import Machine, recording
from tests.ascend.test_guide import GUIDE, commands
from tests.ascend.test_probe import answer, script

PROJECT = Path(__file__).parents[2]
TOOLS = ("docker", "git", "python3", "pip", "hf", "modelscope", "npu-smi", "sudo", "ray", "kubectl", "helm", "qvl")
# A namespace of its own, since the guide's ports are fixed. Its loopback is down at first.
UP = (
    "import fcntl, os, socket, struct, sys; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 73)); os.execvp(sys.argv[1], sys.argv[1:])"
)
# On the page a measurement takes the pictures it should; here it is run, not believed. The page's NPUs have 64 GB, of
# which 32B takes two; those of the made-up host have 32.
FEWER = {
    "--synthetic 200 --size 1024x768": "--synthetic 4 --size 64x48",
    "--retry-delay 10": "--retry-delay 1",
    "qvl launch Qwen/Qwen3-VL-32B-Instruct": "qvl launch Qwen/Qwen3-VL-8B-Instruct",
}


@dataclass(frozen=True)
class Step:
    """One command, its exit code, and what it printed."""

    line: str
    code: int
    printed: str


def with_driver(machine: Machine, *numbers: int) -> Machine:
    machine.nodes(*numbers)
    machine.write("/usr/local/Ascend/driver/version.info", recording("driver-24.1.rc3.version.info"))
    machine.write("/usr/local/Ascend/firmware/version.info", "Version=7.5.0.1.129\npackage_version=24.1.rc3\n")
    for path in ("/usr/local/dcmi/lib", "/usr/local/Ascend/driver/lib64/x", "/etc/ascend_install.info"):
        machine.write(path)
    machine.write("/usr/local/bin/npu-smi").chmod(0o755)
    return machine


def fresh_host(folder: Path) -> Machine:
    """Four idle 910B4 and their driver, and in `inside` what a container with one NPU and the image's software sees."""
    machine = with_driver(Machine(folder), 0, 1, 2, 3)
    (folder / "inside").mkdir()
    inside = with_driver(Machine(folder / "inside"), 0)
    row = matrix.load().vllm_ascend["0.23.0"]
    inside.software(
        row["cann"], torch=row["torch"], torch_npu=row["torch_npu"], vllm=row["vllm"], vllm_ascend="0.23.0",
        transformers="5.5.4",
    )  # fmt: skip
    inside.write("/usr/local/Ascend/nnal/atb/set_env.sh")
    script(inside, answer("npu:0", count=1, torch=row["torch"]))
    for name in TOOLS:
        words = [sys.executable, "-m", "tests.ascend.scripted_tools", name]
        machine.program(name, f'exec {shlex.join(words)} "$@"')
    for place in (machine.root / "data", machine.root / "tmp", folder / "home", folder / "work"):
        place.mkdir()
    return machine


def here(line: str, machine: Machine) -> str:
    """The command with the made-up host's paths in it."""
    for old, new in FEWER.items():
        line = line.replace(old, new)
    return re.sub(
        r"(?<![\w./-])(/+)(?=(dev|data|usr/local|etc|tmp)/)", lambda found: f"{found[1][:-1]}{machine.root}/", line
    )


def follow(machine: Machine, lines: list[str]) -> list[Step]:
    """Run the commands in one shell, as a person would; each one's exit code and output are kept."""
    folder = machine.root.parent
    text = [f"cd {folder}/work"]
    elsewhere = commands(kind="bash other")
    for number, line in enumerate(lines):
        text.append(f"export MADE_UP_HOST={'other' if line in elsewhere else 'first'}")
        text.append(
            f"{{ {here(line, machine)}\n}} > {folder}/out-{number} 2>&1 < /dev/null; echo $? > {folder}/code-{number}"
        )
    (folder / "guide.sh").write_text("\n".join(text) + "\n")
    environ = {
        "PATH": f"{machine.bin}:/usr/bin:/bin", "HOME": str(folder / "home"), "USER": "somebody",
        "MADE_UP": str(folder), "REPOSITORY": str(PROJECT), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'src'}",
    }  # fmt: skip
    words = ["unshare", "--net", sys.executable, "-c", UP, "bash", str(folder / "guide.sh")]
    try:
        subprocess.run(words, env=environ, check=True, timeout=900)
    finally:
        kept = folder / "first.json"
        for one in json.loads(kept.read_text())["containers"].values() if kept.exists() else ():
            if one["pid"]:
                os.kill(one["pid"], signal.SIGKILL)
    return [
        Step(line, int((folder / f"code-{number}").read_text()), (folder / f"out-{number}").read_text())
        for number, line in enumerate(lines)
    ]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made here, and the guide's ports are fixed")
    return follow(fresh_host(tmp_path_factory.mktemp("host")), commands(GUIDE))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_without_the_line_that_ends_ray_its_npus_and_port_are_not_free(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("no network namespace can be made here")
    lines = commands(GUIDE)
    section = lines.index("docker rm -f ray")
    start = next(n for n, line in enumerate(lines) if "ray start --head" in line)
    serve = next(n for n, line in enumerate(lines) if "--ray-address" in line and line.startswith("docker exec"))
    launch = next(line for line in lines[section:] if line.startswith("qvl launch"))
    needed = ("git clone", "cd qvl", "pip install .", "pip install hug", "hf ", "docker pull", "docker build", "export")
    begun = [line for line in lines[:start] if line.startswith(needed)]
    steps = follow(fresh_host(tmp_path), [*begun, lines[start], lines[serve], launch])

    assert not [step.printed for step in steps[:-1] if step.code]
    assert steps[-1].code != 0
    assert "NPU 0" in steps[-1].printed


def expected(line: str) -> set[int]:
    """Warnings are an answer of the doctor, and said on the page where a service holds its port."""
    return {0, 1} if "qvl doctor" in line else {0}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_command_of_the_guide_succeeds_in_order(steps: list[Step]) -> None:
    failed = [step for step in steps if step.code not in expected(step.line)]

    assert len(steps) > 40
    assert not failed, "\n\n".join(f"$ {step.line}\n{step.printed[-1500:]}exit code {step.code}" for step in failed)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_doctor_finds_a_fresh_host_well(steps: list[Step]) -> None:
    first = next(step for step in steps if step.line.startswith("qvl doctor"))

    assert first.code == 0, first.printed


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "lines",
    [
        ["docker pull vllm-ascend:v0.23.0"],
        ["docker build --build-arg BASE=vllm-ascend:v0.23.0 -t qvl-npu:0.1.0 -f deploy/Dockerfile ."],
        ["hf download Qwen/Qwen3-VL-8B-Instruct --local-dir /data/models/m"],
        ["qvl doctor --device npu --no-software"],
        ["pip install ."],
        ["docker run --detach --name a --device /dev/davinci9 a:1"],
        ["ray start --head --prot=6379"],
        ["git clone $REPOSITORY qvl && cd qvl && pip install . && qvl doctor --device npu --no-probe"],
        ["helm install qvl deploy/helm --namespace qvl --values deploy/helm/values-910b.yaml"],
    ],
)
def test_a_step_that_is_missing_or_wrong_ends_with_an_error(lines: list[str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("no network namespace can be made here")
    (step,) = follow(fresh_host(tmp_path), lines)

    assert step.code not in (0, 1) or "qvl doctor" not in step.line
    assert step.code != 0
