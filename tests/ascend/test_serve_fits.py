"""What `qvl launch` and the compose file write for qvl-serve is what qvl-serve takes and does."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import typer

from qvl.ascend import compose, environment, recipe
from qvl.ascend.checks import endpoint
from tests.ascend.test_deploy import plan
from tests.ascend.test_endpoint import Rules, serve  # noqa: F401 - serve is a fixture
from tests.ascend.test_guide import commands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("qvl.cli.serve") is None or importlib.util.find_spec("uvicorn") is None,
    reason="qvl-serve wants the server extra",
)


def parser() -> Any:
    from qvl.cli import serve as module

    app = typer.Typer()
    app.callback()(lambda: None)
    module.register(app)
    return typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def parsed(words: list[str]) -> dict[str, Any]:
    """The options as qvl-serve reads them, from its name on; raises where it refuses one."""
    start = words.index("qvl-serve") + 1
    params: dict[str, Any] = parser().make_context("qvl-serve", words[start:]).params
    return params


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QVL_CONFIG", "QVL_API_KEY", "QVL_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_the_command_in_the_container_is_one_that_qvl_serve_takes() -> None:
    options = parsed(recipe.command(plan(answers="/data/answers", served_name="qwen3vl")))

    assert options["model"] == "Qwen/Qwen3-VL-8B-Instruct"
    assert (options["device"], options["port"], options["allow_unauthenticated"]) == ("npu", 8000, True)
    assert options["cache"] == "sqlite:////var/cache/qvl/answers.db"
    assert list(options["served_model_name"]) == ["qwen3vl"]


def test_the_pool_of_the_compose_file_and_its_engines_are_taken() -> None:
    services = compose.compose(plan(), (0, 1), pool_image="pool:1")["services"]

    pool = parsed(services["pool"]["command"])
    assert list(pool["base_url"]) == ["http://engine-0:8000/v1", "http://engine-1:8000/v1"]
    assert parsed(services["engine-0"]["command"])["cache"] == "off"


def test_every_variable_of_qvl_serve_is_known_to_the_doctor() -> None:
    named = {name for option in parser().params for name in _names(option.envvar)}
    own = {name for name in named if name.startswith("QVL_")}

    assert len(own) > 20
    assert own <= environment.KNOWN


def _names(envvar: str | list[str] | None) -> list[str]:
    return [envvar] if isinstance(envvar, str) else list(envvar or [])


@contextmanager
def running(*words: str, folder: Path) -> Iterator[str]:
    """A real qvl-serve as a process of its own; its address once it listens."""
    import socket
    from contextlib import closing

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "serve.log"
    command = [sys.executable, "-m", "qvl.cli.serve", *words, "--port", str(port), "--cache", "off"]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            end, ready = time.monotonic() + 240, False
            while not ready:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                with suppress(httpx.TransportError):
                    ready = httpx.get(f"http://127.0.0.1:{port}{recipe.READY_PATHS['qvl']}", trust_env=False).is_success
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.slow
def test_qvl_serve_in_front_mends_what_an_endpoint_decodes_wrongly(
    serve: Callable[[Rules], str],  # noqa: F811
    tmp_path: Path,
) -> None:
    upstream = serve(Rules(exif=False, alpha=False))
    words = ("openai:qwen3-vl", "--base-url", f"{upstream}/v1", "--no-canary")

    before = {finding.check: finding.status for finding in endpoint.check(upstream)}
    with running(*words, folder=tmp_path) as url:
        after = {finding.check: finding.status for finding in endpoint.check(url)}

    assert (before["endpoint-exif"], before["endpoint-alpha"]) == ("warn", "warn")
    assert (after["endpoint-exif"], after["endpoint-alpha"]) == ("ok", "ok")


def test_flags_after_two_dashes_in_the_guide_are_taken_by_their_engine() -> None:
    lines = [line for line in commands() if " -- " in line and "--engine vllm" not in line]

    assert lines
    for line in lines:
        flags = shlex.split(line.partition(" -- ")[2])
        assert parsed(["qvl-serve", "model", *flags])["model"] == "model"
