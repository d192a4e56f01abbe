"""`qvl launch --pull` and `--replace` with a scripted docker that keeps one container, and its label, in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from qvl.ascend.launch import Launcher, LaunchError, docker_arguments
from qvl.ascend.recipe import ContainerPlan
from qvl.cli import launch
from tests.ascend.test_launch import calls, service

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.ascend.conftest import Machine

NAME = "catalog"
DOCKER = r"""
printf '%s\0' "$@" >> "{calls}/docker"; printf '\n' >> "{calls}/docker"
missing() { echo "Error response from daemon: No such container: $1" >&2; exit 1; }
case "$1" in
images) [ -f "{calls}/image" ] && printf 'qvl-npu:0.1.0@<none>\n'; exit 0;;
pull) {pull};;
container) [ -f "{calls}/box" ] && cat "{calls}/box" || missing catalog;;
stop) [ -f "{calls}/box" ] || missing "$2"; {stop};;
rm) [ -f "{calls}/box" ] || missing "$2"; rm "{calls}/box";;
run) [ -f "{calls}/box" ] && { echo 'Conflict. The container name "/catalog" is already in use' >&2; exit 125; }
  echo qvl > "{calls}/box"; echo 0123456789abcdef;;
inspect) echo "running 0";;
esac
"""


def docker(machine: Machine, *, pull: str = "", stop: str = ":") -> None:
    text = DOCKER.replace("{pull}", pull or ': > "{calls}/image"').replace("{stop}", stop)
    machine.program("docker", text.replace("{calls}", str(machine.calls)))
    (machine.bin / "rm").symlink_to("/bin/rm")


def run(machine: Machine, *words: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    launch.register(app)
    with service(200) as (port, _):
        pass
    common = ["launch", "Qwen/Qwen3-VL-8B-Instruct", "--image", "qvl-npu:0.1.0", "--name", NAME, "--wait", "0"]
    common += ["--port", str(port), "--skip-check", "mounts", "--skip-check", "npus"]
    return CliRunner().invoke(app, [*common, *words], env={"QVL_API_KEY": None, "PATH": str(machine.bin)})


def verbs(machine: Machine) -> list[str]:
    return [words[0] for words in calls(machine)]


def box(machine: Machine, label: str = "qvl") -> Path:
    """A container of the name that stands there already, with this label's value."""
    path = machine.calls / "box"
    path.write_text(f"{label}\n")
    return path


def test_pull_fetches_an_image_that_is_not_there_before_the_run(machine: Machine) -> None:
    docker(machine)
    without = run(machine)
    result = run(machine, "--pull")

    assert without.exit_code == 2
    assert "docker pull qvl-npu:0.1.0, or --pull" in without.stderr
    assert result.exit_code == 0, result.stderr
    assert calls(machine)[-2] == ["pull", "qvl-npu:0.1.0"]
    assert verbs(machine)[-1] == "run"


def test_a_failed_pull_is_one_line_with_dockers_words_and_ends_nothing(machine: Machine) -> None:
    old = box(machine)
    docker(machine, pull='echo "Error: manifest for qvl-npu:0.1.0 not found: manifest unknown" >&2; exit 1')
    result = run(machine, "--pull", "--replace")

    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("qvl launch: docker pull qvl-npu:0.1.0: Error: manifest for qvl-npu:0.1.0 not found")
    assert old.exists()
    assert not {"run", "stop", "rm"} & set(verbs(machine))


def test_replace_stops_and_removes_the_old_container_and_without_it_the_hint_stays(machine: Machine) -> None:
    box(machine)
    docker(machine)
    (machine.calls / "image").touch()
    without = run(machine)
    result = run(machine, "--replace")

    assert without.exit_code == 2
    assert f"docker rm -f {NAME}, or --replace" in without.stderr
    assert result.exit_code == 0, result.stderr
    assert [words for words in calls(machine) if words[0] in ("stop", "rm")] == [["stop", NAME], ["rm", NAME]]
    assert verbs(machine)[-1] == "run"


def test_replace_without_an_old_container_only_starts(machine: Machine) -> None:
    docker(machine)
    (machine.calls / "image").touch()
    result = run(machine, "--replace")

    assert result.exit_code == 0, result.stderr
    assert not {"stop", "rm"} & set(verbs(machine))


@pytest.mark.parametrize("label", ["", "<no value>"])
def test_a_container_that_qvl_did_not_start_is_left_alone(machine: Machine, label: str) -> None:
    old = box(machine, label)
    docker(machine)
    (machine.calls / "image").touch()
    result = run(machine, "--replace", "--pull")

    assert result.exit_code == 2
    assert f"container {NAME} was not started by qvl launch" in result.stderr
    assert result.stderr.count("\n") == 1
    assert old.exists()
    assert set(verbs(machine)) == {"container"}


def test_the_old_container_lives_on_if_another_check_fails_or_it_cannot_be_stopped(machine: Machine) -> None:
    old = box(machine)
    docker(machine, stop='echo "Error response from daemon: permission denied" >&2; exit 1')
    absent = run(machine, "--replace")
    (machine.calls / "image").touch()
    stuck = run(machine, "--replace")

    assert "image qvl-npu:0.1.0 not found" in absent.stderr
    assert "docker stop: Error response from daemon: permission denied" in stuck.stderr
    assert (absent.exit_code, stuck.exit_code) == (2, 2)
    assert old.exists()
    assert "run" not in verbs(machine)


def test_what_the_old_container_holds_is_no_hindrance_and_what_another_holds_is(healthy: Machine) -> None:
    identity = "7c" * 32
    healthy.npu_smi("23.0.2.1-910B2C.txt")
    healthy.write("/proc/91822/comm", "python3.10\n")
    healthy.write("/proc/91822/cgroup", f"0::/docker/{identity}\n")
    healthy.program("docker", f'[ "$1" = ps ] && echo "{identity} {NAME}"')
    launcher = Launcher(healthy.host())

    launcher.check_npus((0,), ending=NAME)
    for ending in ("", "other"):
        with pytest.raises(LaunchError, match=f"in container {NAME}"):
            launcher.check_npus((0,), ending=ending)


def test_every_container_bears_the_label() -> None:
    words = docker_arguments(ContainerPlan(model="a/b", image="i:1", npus=(0,), engine="vllm"))

    assert words[words.index("--label") + 1] == "qvl.launch=vllm"


def test_a_dry_run_shows_both_and_its_script_does_the_same(machine: Machine) -> None:
    result = run(machine, "--dry-run", "--pull", "--replace")
    first, second, third = result.stdout.split("\n", 2)

    assert first == "docker pull qvl-npu:0.1.0 &&"
    assert "--filter 'name=^catalog$' --filter label=qvl.launch |" in second
    assert third.startswith("docker run")
    assert not (machine.calls / "docker").exists()
    machine.program("docker", 'echo "$*" >> "$CALLS"; [ "$1" = ps ] && echo 0123; exit 0')
    (machine.bin / "xargs").symlink_to("/usr/bin/xargs")
    done = machine.host().run(["bash", "-c", result.stdout], environ={"CALLS": str(machine.calls / "said")})
    assert done.code == 0, done.stderr
    said = (machine.calls / "said").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["pull", "ps", "stop", "rm", "run"]
    assert said[2:4] == ["stop 0123", "rm 0123"]
    machine.program("docker", 'echo "$*" >> "$CALLS"; exit 1')
    assert machine.host().run(["bash", "-c", result.stdout], environ={"CALLS": str(machine.calls / "failed")}).code == 1
    assert (machine.calls / "failed").read_text() == "pull qvl-npu:0.1.0\n"


@pytest.mark.parametrize("option", ["--pull", "--replace"])
def test_compose_has_its_own_way(machine: Machine, tmp_path: Path, option: str) -> None:
    result = run(machine, "--compose", str(tmp_path / "out"), option)

    assert result.exit_code == 2
    assert f"{option} does not go with --compose" in result.stderr
    assert not (tmp_path / "out").exists()
