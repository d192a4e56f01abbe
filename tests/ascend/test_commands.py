"""`qvl doctor` and `qvl launch` as programs: what they print, where, and with which exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import typer
import yaml
from typer.testing import CliRunner

from qvl.cli import doctor, launch
from tests.ascend.test_launch import calls, docker, service

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.ascend.conftest import Machine

LAUNCH = ["launch", "Qwen/Qwen3-VL-8B-Instruct"]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("doctor")(doctor.doctor)
    launch.register(app)
    return app


def run(app: typer.Typer, words: list[str], machine: Machine | None = None, **environ: str) -> Result:
    path = {"PATH": str(machine.bin)} if machine else {}
    return CliRunner().invoke(app, words, env={"QVL_API_KEY": None, "VLLM_API_KEY": None, **path, **environ})


def test_doctor_prints_one_json_object_and_exits_by_it(app: typer.Typer) -> None:
    result = run(app, ["doctor", "--json", "--no-probe", "--device", "npu"])

    assert json.loads(result.stdout)["exit_code"] == result.exit_code == 2


def test_doctor_prints_text_with_a_verdict(app: typer.Typer) -> None:
    result = run(app, ["doctor", "--no-probe", "--device", "cpu", "--cache", "memory:"])

    assert "warnings" in result.stdout.splitlines()[-1]
    assert result.exit_code in (0, 1)


def test_doctor_refuses_an_unknown_device_in_one_line(app: typer.Typer) -> None:
    result = run(app, ["doctor", "--device", "tpu"])

    assert result.exit_code == 2
    assert result.stderr.strip() == "qvl doctor: unknown --device 'tpu' (one of auto, npu, cuda, cpu)"


def test_dry_run_prints_the_command_and_runs_nothing(app: typer.Typer, machine: Machine) -> None:
    docker(machine)
    result = run(app, [*LAUNCH, "--image", "qvl-npu:0.1.0", "--npus", "0", "--dry-run"], machine)

    assert result.exit_code == 0
    assert result.stdout.startswith("docker run \\\n")
    assert not (machine.calls / "docker").exists()


def test_dry_run_prints_what_a_run_would_use_for_this_chip(app: typer.Typer, machine: Machine) -> None:
    machine.npu_smi("24.1.0.1-310P3.txt")
    words = [*LAUNCH, "--image", "qvl-npu:0.1.0", "--npus", "2", "--dry-run"]

    read, told = run(app, words, machine), run(app, [*words, "--chip", "910B4"], machine)

    assert "--shm-size 10g" in read.stdout
    assert "--dtype float16" in read.stdout
    assert "--shm-size 1g" in told.stdout


def test_an_address_for_all_wants_a_key(app: typer.Typer, machine: Machine) -> None:
    words = [*LAUNCH, "--image", "qvl-npu:0.1.0", "--host", "0.0.0.0", "--dry-run"]

    refused = run(app, words, machine)
    with_key = run(app, words, machine, QVL_API_KEY="s3cret-key")
    open_to_all = run(app, [*words, "--allow-unauthenticated"], machine)

    assert refused.exit_code == 2
    assert "QVL_API_KEY" in refused.stderr
    assert with_key.exit_code == open_to_all.exit_code == 0
    assert "s3cret-key" not in with_key.stdout
    assert "--env QVL_API_KEY \\" in with_key.stdout


def test_flags_after_two_dashes_reach_the_engine(app: typer.Typer) -> None:
    words = [*LAUNCH, "--image", "vllm-ascend:v0.23.0", "--engine", "vllm", "--dry-run", "--", "--max-num-seqs", "64"]

    assert run(app, words).stdout.rstrip().endswith("--max-num-seqs 64")


def test_npus_that_are_not_there_end_it_with_one_line(app: typer.Typer, machine: Machine) -> None:
    docker(machine)
    with service(200) as (port, _):
        result = run(app, [*LAUNCH, "--image", "qvl-npu:0.1.0", "--npus", "63", "--port", str(port)], machine)

    assert result.exit_code == 2
    assert result.stderr.startswith("qvl launch: NPU 63 not found on this host")
    assert not (machine.calls / "docker").exists() or all(words[0] != "run" for words in calls(machine))


def test_all_that_is_missing_is_told_at_once(app: typer.Typer) -> None:
    result = run(app, ["launch", "--compose", "out", "--engine", "vllm"])

    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for word in ("MODEL", "--image", "--pool-image", "qvl launch Qwen/"):
        assert word in result.stderr


def test_folders_that_are_not_there_are_told_before_docker_makes_them(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    words = ["launch", str(tmp_path / "weights"), "--image", "qvl-npu:0.1.0", "--dry-run"]
    words += ["--hub-cache", str(tmp_path / "hub"), "--answers", str(tmp_path / "answers")]
    result = run(app, words)

    assert result.exit_code == 0
    said = result.stderr.splitlines()
    assert [line.split()[:3] for line in said] == [
        ["warning:", "MODEL", str(tmp_path / "weights")],
        ["warning:", "--hub-cache", str(tmp_path / "hub")],
    ]


def test_compose_writes_all_files_that_it_needs(app: typer.Typer, tmp_path: Path) -> None:
    words = [*LAUNCH, "--image", "qvl-npu:0.1.0", "--npus", "0-3", "--compose", str(tmp_path / "out")]
    result = run(app, words)

    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(written) == 6
    services = yaml.safe_load((tmp_path / "out/docker-compose.yml").read_text())["services"]
    assert sum(name.startswith("engine-") for name in services) == 4


def test_compose_with_vllm_wants_an_image_for_the_pool(app: typer.Typer, tmp_path: Path) -> None:
    words = [*LAUNCH, "--image", "vllm-ascend:v0.23.0", "--engine", "vllm", "--compose", str(tmp_path)]
    result = run(app, words)

    assert result.exit_code == 2
    assert "--pool-image" in result.stderr


DRY = [*LAUNCH, "--image", "qvl-npu:0.1.0", "--dry-run"]


@pytest.mark.parametrize("engine", ["qvl", "vllm"])
def test_in_the_hosts_network_the_engine_listens_on_the_address_and_port_of_the_plan_only(
    app: typer.Typer, engine: str
) -> None:
    words = [*DRY, "--engine", engine, "--network", "host", "--port", "9000"]
    own, open_to_all = run(app, words), run(app, [*words, "--host", "0.0.0.0"])

    assert "--host 127.0.0.1" in own.stdout
    assert "--port 9000" in own.stdout
    assert "0.0.0.0" not in own.stdout
    assert "8000" not in own.stdout
    assert open_to_all.exit_code == 2
    assert "needs an API key" in open_to_all.stderr


@pytest.mark.parametrize(
    ("chip", "words"),
    [
        ("910B", "--dtype bfloat16"),
        ("a3", "--dtype bfloat16"),
        ("310P", "--dtype float16"),
        ("310P RC", "/dev/user_config"),
        ("950", "/dev/ummu"),
        ("910B4", "--dtype bfloat16"),
        ("310P3vir04_3c", "--dtype float16"),
    ],
)
def test_a_chip_is_told_by_its_kind_or_by_its_name(app: typer.Typer, chip: str, words: str) -> None:
    result = run(app, [*DRY, "--chip", chip])

    assert result.exit_code == 0
    assert words in result.stdout.replace(" \\\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chip", "nonsense"], "one of 910B, A3, 310P, 310P RC, 950"),
        (["--chip", "910A"], "no build"),
        (["--env", "ASCEND_RT_VISIBLE_DEVICES=3"], "--npus"),
        (["--env", "QVL_API_KEY=hush"], "export QVL_API_KEY"),
        (["--env", "VLLM_API_KEY=hush"], "export VLLM_API_KEY"),
        (["--env", "1X=hush"], "'1X'"),
        (["--mount", "/tmp:/root/.cache"], "--hub-cache"),
        (["--mount", "/tmp:/root/.cache/:ro"], "--hub-cache"),
        (["--mount", "/tmp:/usr/local/dcmi"], "/usr/local/dcmi"),
        (["--docker-arg", "image2"], "is not an option"),
        (["--docker-arg=--"], "is not an option"),
        (["--docker-arg=--network=host"], "--network"),
        (["--skip-check", "npu"], "npus, mounts"),
        (["extra"], "'extra'"),
        (["--npus", "0-99999999"], "0-99999999"),
        (["--npus", "9" * 5000], "NPU number"),
        (["--shm-size", "banana"], "banana"),
        (["--shm-size", "0"], "--shm-size"),
        (["--restart", "sometimes"], "unless-stopped"),
        (["--name", "bad name"], "bad name"),
        (["--name", "-x"], "letters"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(app: typer.Typer, words: list[str], said: str) -> None:
    result = run(app, [*DRY, *words])

    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "hush" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_recommended_value_is_replaced_and_not_given_twice(app: typer.Typer) -> None:
    words = ["--env", "OMP_NUM_THREADS=4", "--shm-size", "2GiB", "--restart", "on-failure:3"]
    result = run(app, [*DRY, *words, "--docker-arg=--ulimit=core=0", "--mount", "/tmp:/root/.cache/x"])

    assert result.exit_code == 0
    assert "OMP_NUM_THREADS=4" in result.stdout
    assert "OMP_NUM_THREADS=1" not in result.stdout
