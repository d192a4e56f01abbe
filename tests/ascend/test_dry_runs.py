"""What `qvl launch --dry-run` would start on six kinds of host, whole, to be read by a person: `dry_runs/*.sh`,
and 910A.txt for the one that is refused.

No NPU is here: chips are named by what their npu-smi prints, nodes by what their hosts have. `python -m
tests.ascend.test_dry_runs` writes the files anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qvl.ascend.launch import as_text, docker_arguments
from qvl.ascend.recipe import ContainerPlan
from qvl.cli import launch
from qvl.errors import ConfigError

FOLDER = Path(__file__).parent / "dry_runs"
DENSE, MIXED = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct"
CARD = ("davinci_manager", "devmm_svm", "hisi_hdc")
IMAGE = "quay.io/ascend/vllm-ascend:v0.23.0"
HOSTS: dict[str, dict[str, Any]] = {
    "910B4": {"model": DENSE, "chip": "910B4", "npus": (2,), "image": IMAGE, "nodes": CARD},
    "A3": {"model": MIXED, "chip": "Ascend910", "npus": (0, 1), "image": f"{IMAGE}-a3", "nodes": CARD},
    "310P-Duo": {
        "model": DENSE,
        "chip": "310P3",
        "npus": (0,),
        "image": "quay.io/ascend/vllm-ascend:v0.18.0-310p",
        "nodes": CARD,
    },
    "200I": {
        "model": DENSE,
        "chip": "310P1",
        "npus": (0,),
        "image": f"{IMAGE}-310p",
        "nodes": ("davinci_manager", "ascend_manager", "user_config"),
    },
    "950DT": {
        "model": DENSE,
        "chip": "Ascend950DT",
        "npus": (0, 1),
        "image": f"{IMAGE}-950dt",
        "nodes": ("davinci_manager", "hisi_hdc", "ummu", "uburma"),
        "tool": "/usr/local/sbin/npu-smi",
    },
}


def command(name: str) -> str:
    return as_text(docker_arguments(ContainerPlan(engine="vllm", env=("HF_TOKEN",), **HOSTS[name]))) + "\n"


@pytest.mark.parametrize("name", HOSTS)
def test_the_command_is_the_one_that_was_read(name: str) -> None:
    assert command(name) == (FOLDER / f"{name}.sh").read_text(encoding="utf-8")


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
    for kind in HOSTS:
        (FOLDER / f"{kind}.sh").write_text(command(kind), encoding="utf-8")
    (FOLDER / "910A.txt").write_text(refusal(), encoding="utf-8")
