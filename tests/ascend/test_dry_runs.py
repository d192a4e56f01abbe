"""What `qvl launch --dry-run` says and would start on six kinds of host, to be read by a person: `dry_runs/*.sh`, and
910A.txt for the one that is refused.

No NPU is here: the hosts are made up, each with an npu-smi that prints a recorded table, the nodes of its kind and the
files that upstream mounts there. `python -m tests.ascend.test_dry_runs` writes the files anew.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qvl.ascend import chips, recipe
from qvl.ascend.launch import docker_arguments
from qvl.ascend.recipe import ContainerPlan
from qvl.cli import launch
from qvl.cli.launch import LaunchOptions
from qvl.errors import ConfigError
from tests.ascend.conftest import Machine
from tests.ascend.test_launch import values

FOLDER = Path(__file__).parent / "dry_runs"
DENSE, MIXED = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct"
CARD = ("davinci_manager", "devmm_svm", "hisi_hdc")
NEW = ("davinci_manager", "hisi_hdc", "ummu", "uburma")
IMAGE = "quay.io/ascend/vllm-ascend:v0.23.0"
NEW_FILES = ("/etc/hccl_rootinfo.json", "/etc/hixlep/x", "/usr/bin/urma_admin", "/lib/route.conf")


@dataclass(frozen=True)
class Kind:
    """A kind of host: what its npu-smi prints, its nodes, files beside those of every driver, and what is launched."""

    table: str
    nodes: tuple[str, ...]
    npus: str
    image: str
    model: str = DENSE
    files: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = (("HF_TOKEN", "secret"),)


HOSTS: dict[str, Kind] = {
    "910B4": Kind("24.1.rc3-910B4.txt", (*CARD, *(f"davinci{number}" for number in range(4))), "2", IMAGE),
    "A3": Kind("26.0.rc2-910-two-chips.txt", (*CARD, "davinci0", "davinci1"), "0,1", f"{IMAGE}-a3", MIXED),
    "310P-Duo": Kind("24.1.0.1-310P3.txt", (*CARD, "davinci2", "davinci3"), "2,3", f"{IMAGE}-310p"),
    "310P-Duo-one": Kind(
        "24.1.0.1-310P3.txt", (*CARD, "davinci2", "davinci3"), "3", "quay.io/ascend/vllm-ascend:v0.18.0-310p"
    ),
    "200I": Kind(
        "23.0.6-310P3-memory-na.txt",
        ("davinci0", "davinci_manager", "ascend_manager", "user_config"),
        "0",
        f"{IMAGE}-310p",
        "Qwen/Qwen3-VL-4B-Instruct",
        ("/usr/local/sbin/npu-smi", "/usr/lib64/libyaml-0.so.2.0.9", "/usr/lib64/libsemanage.so.2"),
    ),
    "950DT": Kind(
        "25.6.0-950DT.txt",
        (*NEW, "davinci0", "davinci1"),
        "0",
        f"{IMAGE}-950dt",
        "Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-mxfp8",
        ("/usr/local/sbin/npu-smi", *NEW_FILES),
        (("VLLM_USE_MODELSCOPE", "True"),),
    ),
    "950DT-plain": Kind(
        "25.6.0-950DT.txt", (*NEW, "davinci0", "davinci1"), "0", f"{IMAGE}-a5", files=("/usr/local/sbin/npu-smi",)
    ),
}


def host_of(kind: Kind, folder: Path) -> Machine:
    machine = Machine(folder)
    for name in kind.nodes:
        machine.write(f"/dev/{name}").chmod(0o660)
    for path in kind.files:
        machine.write(path)
    if not any(path in chips.TOOLS for path in kind.files):
        machine.write(chips.TOOLS[0])
    machine.npu_smi(kind.table)
    machine.environ |= dict(kind.environ)
    return machine


def dry_run(name: str, folder: Path, **further: Any) -> str:
    """What a person sees: the notes, as comments, and the command."""
    kind = HOSTS[name]
    options = {"model": kind.model, "image": kind.image, "npus": kind.npus, "engine": "vllm", "dry_run": True}
    said, command = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(command):
        hub = {"hub_cache": folder}
        launch._launch(host_of(kind, folder).host(), LaunchOptions(**options | hub | further), [])
    notes = "".join(f"# {line}\n" for line in said.getvalue().splitlines())
    return (notes + command.getvalue()).replace(f"{folder}:", "/root/.cache:")


@pytest.mark.parametrize("name", HOSTS)
def test_the_command_is_the_one_that_was_read(name: str, tmp_path: Path) -> None:
    assert dry_run(name, tmp_path) == (FOLDER / f"{name}.sh").read_text(encoding="utf-8")


def test_only_files_that_the_host_has_are_mounted(tmp_path: Path) -> None:
    given = [line.split()[1] for line in dry_run("950DT", tmp_path).splitlines() if "--volume" in line]

    for path in ("/etc/hccl_rootinfo.json", "/etc/hixlep", "/usr/bin/urma_admin", "/lib/route.conf"):
        assert f"{path}:{path}:ro" in given
    (tmp_path / "bare").mkdir()
    assert "hixlep" not in dry_run("950DT-plain", tmp_path / "bare")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/usr/lib/aarch64-linux-gnu/libyaml-0.so.2", "/usr/lib/aarch64-linux-gnu/libyaml-0.so.2"),
        ("/usr/lib64/libyaml-0.so.2", "/usr/lib64/libyaml-0.so.2"),
        ("/usr/lib64/libyaml-0.so.2.0.9", "/usr/lib64/libyaml-0.so.2.0.9"),
        ("/usr/local/sbin/npu-smi", "/usr/lib/aarch64-linux-gnu/libyaml-0.so.2"),
    ],
)
def test_libyaml_is_mounted_from_where_the_host_has_it(path: str, source: str) -> None:
    plan = ContainerPlan(model=DENSE, image=IMAGE, npus=(0,), kind="310P RC", files=(path,))

    assert (source, "/usr/lib64/libyaml-0.so.2") in recipe.driver_mounts(plan)


def test_a_root_complex_starts_by_the_program_of_its_image(machine: Machine) -> None:
    plan = ContainerPlan(model=DENSE, image=IMAGE, npus=(0,), kind="310P RC", engine="vllm")
    entrypoint, arguments = recipe.shell(plan)

    assert values(docker_arguments(plan), "--entrypoint") == ["/usr/local/bin/entrypoint.sh"] == [entrypoint]
    # It is a script that ends with exec "$@"; what it gets must run as it stands.
    machine.program("entrypoint.sh", 'echo daemons; exec "$@"')
    machine.program("vllm", 'echo "$LD_LIBRARY_PATH|$*"')
    done = machine.host().run(["entrypoint.sh", *arguments])
    assert done.stdout.startswith("daemons\n/usr/local/Ascend/driver/lib64:"), done
    assert ":/usr/lib64:" in done.stdout
    assert "|serve Qwen/Qwen3-VL-8B-Instruct " in done.stdout


def test_a_privileged_container_counts_the_nodes_that_the_host_has(tmp_path: Path) -> None:
    kind = HOSTS["950DT"]
    nodes = (*NEW, "davinci0", "davinci1", "davinci3", "davinci4")
    plan = ContainerPlan(model=kind.model, image=kind.image, npus=(3, 4), engine="vllm", kind="950", nodes=nodes)

    assert "ASCEND_RT_VISIBLE_DEVICES=2,3" in values(docker_arguments(plan), "--env")


def refusal() -> str:
    """What a host with the first 910 is told, as it stands on its terminal."""
    app = typer.Typer()
    app.callback()(lambda: None)
    launch.register(app)
    words = ["launch", DENSE, "--engine", "vllm", "--image", IMAGE, "--chip", "910A", "--dry-run"]
    result = CliRunner().invoke(app, words, env={"VLLM_API_KEY": None})
    return f"{result.stdout}{result.stderr}exit code {result.exit_code}\n"


@pytest.mark.parametrize("chip", ["910A", "910ProA", "910ProB", "Ascend 910A"])
def test_the_first_910_is_refused_by_name(chip: str) -> None:
    with pytest.raises(ConfigError, match="no build for the first 910"):
        ContainerPlan(model=DENSE, image=IMAGE, npus=(0,), chip=chip)


def test_the_refusal_is_the_one_that_was_read() -> None:
    assert refusal() == (FOLDER / "910A.txt").read_text(encoding="utf-8")


def test_half_a_card_of_a3_a_colon_and_unreadable_options_are_refused() -> None:
    plan: dict[str, Any] = {"model": DENSE, "image": IMAGE, "npus": (0,), "engine": "vllm"}
    for changes, word in (
        ({"chip": "Ascend910"}, "pairs"),
        ({"model": "/data/a:b"}, "':'"),
        ({"env": ("9X=1",)}, "--env"),
        ({"mounts": ("data",)}, "--mount"),
    ):
        with pytest.raises(ConfigError, match=word):
            ContainerPlan(**plan | changes)


def test_a_flag_after_two_dashes_takes_the_place_of_the_recipes_own() -> None:
    words = docker_arguments(
        ContainerPlan(
            model=DENSE,
            image=IMAGE,
            npus=(0,),
            engine="vllm",
            extra=("--max-num-seqs", "64", "--enable-prefix-caching"),
        )
    )

    assert words.count("--max-num-seqs") == 1
    assert "--no-enable-prefix-caching" not in words


def test_a_host_network_publishes_no_port_and_further_arguments_stand_before_the_image() -> None:
    words = docker_arguments(
        ContainerPlan(model=DENSE, image=IMAGE, npus=(0,), network="host", docker_args=("--ulimit=core=0",))
    )

    assert "--publish" not in words
    assert words.index("--ulimit=core=0") < words.index(IMAGE)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for host in HOSTS:
        with tempfile.TemporaryDirectory() as place:
            (FOLDER / f"{host}.sh").write_text(dry_run(host, Path(place)), encoding="utf-8")
    (FOLDER / "910A.txt").write_text(refusal(), encoding="utf-8")
