"""`qvl doctor --url` against real servers of the bundled model, right ones and ones with a planted fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qvl.ascend.checks import endpoint
from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.cli import app
from tests.parity import checkpoints
from tests.parity.own_minds import SamplingBackend
from tests.parity.processes import served
from tests.server.conftest import start

pytestmark = pytest.mark.slow
SYSTEM = "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}{%- for message in turns.rest -%}"


def own(folder: Path | None = None) -> LocalBackend:
    return LocalBackend(None if folder is None else str(folder), device="cpu", dtype="float32")


@contextmanager
def at(backend: Backend) -> Iterator[str]:
    running = start(backend)
    try:
        yield f"{running.url}/v1"
    finally:
        running.stop()


def warnings(url: str) -> dict[str, str]:
    """What is not right, by check; `skip` is what answers that are sampled do not tell."""
    found = {one.check: one for one in endpoint.check(url)}
    assert len(found) == 11
    return {name: f"{one.status} {one.summary}" for name, one in found.items() if one.status != "ok"}


def test_a_server_of_the_bundled_model_has_no_warning() -> None:
    with at(own()) as url:
        assert warnings(url) == {}
        words = ["doctor", "--url", url, "--no-probe", "--no-software", "--port", "0"]
        shown = CliRunner().invoke(app, words).output
    (line,) = [line for line in shown.splitlines() if "endpoint-tokens" in line]
    assert "budget of 12288 to 16384 pixels" in line


def template(folder: Path) -> Backend:
    change = ("'<|im_start|>' + message.role", "'<|im_start|> ' + message.role")
    return own(checkpoints.with_template(folder, lambda text: text.replace(*change)))


def system(folder: Path) -> Backend:
    change = ("{%- for message in turns.rest -%}", SYSTEM)
    return own(checkpoints.with_template(folder, lambda text: text.replace(*change)))


@pytest.mark.parametrize(
    ("planted", "check", "told"),
    [
        (template, "endpoint-template", "another chat template"),
        (system, "endpoint-template", "another default system message"),
        (lambda folder: SamplingBackend(own()), "endpoint-repeats", "sampling is applied"),
        (lambda folder: own(checkpoints.with_patches_of_14(folder)), "endpoint-tokens", "another patch size"),
    ],
)
def test_a_planted_fault_is_named_and_nothing_else(
    tmp_path: Path, planted: Callable[[Path], Backend], check: str, told: str
) -> None:
    with at(planted(tmp_path / "m")) as url:
        found = warnings(url)
    assert [name for name, told in found.items() if not told.startswith("skip ")] == [check]
    assert found[check].startswith(f"warn {told}")


def test_pictures_that_are_read_wrongly_are_named() -> None:
    with served("exif,alpha") as name:
        found = warnings(name.split(",")[1].removeprefix("base_url="))
    assert list(found) == ["endpoint-exif", "endpoint-alpha"]
    assert "without its EXIF orientation" in found["endpoint-exif"]
    assert "on black" in found["endpoint-alpha"]
