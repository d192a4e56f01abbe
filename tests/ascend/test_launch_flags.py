"""Flags after `--` of `qvl launch`: what each engine takes, and what is refused before docker starts."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from qvl.ascend import flags
from qvl.ascend.recipe import ContainerPlan, command
from qvl.cli import launch
from qvl.cli.serve_settings import ServeSettings
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from click.testing import Result

    from tests.ascend.conftest import Machine


def run(engine: str, *words: str, options: tuple[str, ...] = ("--dry-run",), path: str | None = None) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    launch.register(app)
    common = ["launch", "Qwen/Qwen3-VL-8B-Instruct", "--image", "i:1", "--engine", engine, *options, "--", *words]
    environ = {"QVL_API_KEY": None, "VLLM_API_KEY": None, **({"PATH": path} if path else {})}
    return CliRunner().invoke(app, common, env=environ)


@pytest.mark.parametrize(
    ("engine", "words", "meant"),
    [
        ("vllm", ["--max-num-seq-s", "8"], "--max-num-seqs"),
        ("vllm", ["--max-modellen=4096"], "--max-model-len"),
        ("vllm", ["--tensor-paralel-size", "2"], "--tensor-parallel-size"),
        ("vllm", ["--max-num-seqs", "8", "--no-enabel-prefix-caching"], "--enable-prefix-caching"),
        ("vllm", ["--limit-mm-per-promt.image", "4"], "--limit-mm-per-prompt"),
        ("vllm", ["-xx", "4"], "vllm serve --help"),
        ("qvl", ["--max-num-seq", "8"], "--max-num-seqs"),
        ("qvl", ["--cache-mod=off"], "--cache-mode"),
        ("qvl", ["--max_num_seqs", "8"], "--max-num-seqs"),
        ("qvl", ["--tensor-parallel-size", "2"], "has no flag --tensor-parallel-size"),
    ],
)
def test_an_unknown_flag_is_one_line_with_the_nearest_and_the_way_round(
    engine: str, words: list[str], meant: str
) -> None:
    result = run(engine, *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert meant in result.stderr
    assert "--skip-check flags" in result.stderr
    assert run(engine, *words, options=("--dry-run", "--skip-check", "flags")).exit_code == 0


def test_docker_is_not_asked_about_anything_before(machine: Machine) -> None:
    machine.program("docker", f': > "{machine.calls}/docker"')
    result = run("vllm", "--max-num-seq-s", "8", options=(), path=str(machine.bin))

    assert result.exit_code == 2
    assert not (machine.calls / "docker").exists()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm", ["--max_num_seqs", "8", "-tp", "1", "-O3", "-O.mode=3", "--seed", "-1"]),
        ("vllm", ["--no-async-scheduling", "--no-enable-chunked-prefill", "--enforce-eager"]),
        ("vllm", ["--limit-mm-per-prompt.image=4", "--compilation-config.cudagraph_mode", "PIECEWISE"]),
        ("vllm", ["--chat-template", "- {{ messages }}", "--swap-space=0", "--max-num-se=8"]),
        ("vllm", ["--additional-config", '{"a": 1}', "--mm-encoder-tp-mode", "data", "--allowed-origins+", '["*"]']),
        ("qvl", ["--max-num-seqs", "8", "--cache-mode=off", "--no-canary", "--limit-mm-per-prompt.image", "4"]),
    ],
)
def test_what_the_engine_takes_goes_on(engine: str, words: list[str]) -> None:
    result = run(engine, *words)

    assert result.exit_code == 0, result.stderr


def test_every_setting_of_the_server_is_a_known_flag() -> None:
    known = launch._flags_of("qvl")

    for field in fields(ServeSettings):
        if field.name not in ("model", "limit_images", "limit_videos"):
            assert f"--{field.name.replace('_', '-')}" in known


@pytest.mark.parametrize("engine", ["qvl", "vllm"])
def test_the_recipes_own_flags_are_known(engine: str) -> None:
    plan = ContainerPlan(model="a/b", image="i:1", npus=(0,), engine=engine, answers="/data", chip="310P3")

    flags.check(engine, command(plan), launch._flags_of(engine))


@pytest.mark.parametrize("engine", ["qvl", "vllm"])
@pytest.mark.parametrize("words", [["--port", "9000"], ["--port=9000"], ["--host", "127.0.0.1"], ["--uds", "/x"]])
def test_the_address_belongs_before_the_dashes(engine: str, words: list[str]) -> None:
    result = run(engine, *words, options=("--dry-run", "--skip-check", "flags"))

    assert (result.exit_code, result.stdout) == (2, "")
    assert "before --" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_beginning_of_port_is_port_for_vllm() -> None:
    with pytest.raises(ConfigError, match="--por"):
        ContainerPlan(model="a/b", image="i:1", npus=(0,), engine="vllm", extra=("--por", "9000"))
