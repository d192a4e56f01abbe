"""Each planted fault, made for real, is named at its layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.backends.local.backend import LocalBackend
from qvl.parity import Case, ParityReport, compare
from tests.parity import checkpoints
from tests.parity.conftest import QUESTION
from tests.parity.own_minds import SamplingBackend
from tests.parity.processes import served
from tests.server.conftest import start


def other(folder: Path | None = None, **options: object) -> Pipeline:
    return Pipeline(
        None if folder is None else str(folder), **{"device": "cpu", "dtype": "float32", "cache": "off", **options}
    )


def at(name: str) -> Pipeline:
    """The pipeline of an endpoint as `served` names it."""
    _, url, _ = name.split(",")
    return Pipeline("openai:bundled", base_url=url.removeprefix("base_url="), cache="off", api_key="x")


def against(local: Pipeline, cases: list[Case], b: Pipeline) -> ParityReport:
    with b:
        return compare(local, b, cases)


def test_a_patch_size_of_14(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    folder = checkpoints.with_patches_of_14(tmp_path / "m")
    wide = tmp_path / "wide.png"
    with Image.open(cases[0].pictures[0]) as image:
        image.resize((600, 400)).save(wide)
    report = against(local, [Case("wide", (wide,), question=QUESTION)], other(folder))
    assert report.layer == "picture tokens"
    assert [cause.name for cause in report.causes] == ["patch"]
    assert "16 and 14" in report.causes[0].evidence
    # A square has as many tokens either way here; what both sides tell of themselves names it.
    report = against(local, cases[:1], other(folder))
    assert report.layer == "log-probabilities"
    assert [cause.name for cause in report.causes] == ["patch"]


def test_another_template(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    changed = checkpoints.with_template(
        tmp_path / "m", lambda text: text.replace("'<|im_start|>' + message.role", "'<|im_start|> ' + message.role")
    )
    report = against(local, cases[:3], other(changed))
    assert report.layer == "template"
    assert [cause.name for cause in report.causes] == ["template"]


def test_a_default_system_message(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    system = "{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}{%- for message in turns.rest -%}"
    changed = checkpoints.with_template(
        tmp_path / "m", lambda text: text.replace("{%- for message in turns.rest -%}", system)
    )
    report = against(local, cases[:2], other(changed))
    assert report.layer == "template"
    assert [cause.name for cause in report.causes] == ["system"]


def test_bfloat16(local: Pipeline, cases: list[Case]) -> None:
    report = against(local, cases, other(dtype="bfloat16"))
    assert report.layer == "log-probabilities"
    assert [cause.name for cause in report.causes] == ["dtype"]


@pytest.mark.slow
def test_int8(local: Pipeline, cases: list[Case]) -> None:
    report = against(local, cases, other(quantize="int8"))
    assert report.layer == "log-probabilities"
    assert [cause.name for cause in report.causes] == ["quantisation"]


@pytest.mark.slow
def test_one_other_layer(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    report = against(local, cases, other(checkpoints.with_another_layer(tmp_path / "m")))
    assert report.layer == "log-probabilities"
    assert [cause.name for cause in report.causes] == ["weights"]


@pytest.mark.slow
def test_sampling(local: Pipeline, cases: list[Case]) -> None:
    texts = [case for case in cases if case.kind == "text"]
    backend = SamplingBackend(LocalBackend(device="cpu", dtype="float32"))
    report = against(local, texts, Pipeline(backend=backend, cache="off"))
    assert report.layer == "text"
    assert report.causes[0].name == "sampling"
    assert {cause.name for cause in report.causes} == {"sampling"}


def test_nothing_between_local_and_a_server(local: Pipeline, cases: list[Case]) -> None:
    running = start(LocalBackend(device="cpu", dtype="float32"))
    try:
        for concurrency in (1, 8):
            server = Pipeline(
                "openai:bundled", base_url=f"{running.url}/v1", cache="off", api_key="x", concurrency=concurrency
            )
            report = against(local, cases, server)
            assert report.layer is None
            assert report.causes == []
            assert {"pixels", "picture tokens", "template", "prompt", "log-probabilities", "text"} <= {*report.shown}
    finally:
        running.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"quantize": "int8"}, "quantisation"),
        ({"dtype": "bfloat16", "quantize": "int8"}, "quantisation"),
        ({}, "weights"),
    ],
)
def test_what_an_endpoint_computes_with_is_guessed(
    local: Pipeline, cases: list[Case], tmp_path: Path, options: dict[str, str], named: str
) -> None:
    folder = None if options else str(checkpoints.with_another_layer(tmp_path / "m"))
    running = start(LocalBackend(folder, device="cpu", **{"dtype": "float32", **options}))
    try:
        server = Pipeline(f"openai:{folder or 'bundled'}", base_url=f"{running.url}/v1", cache="off", api_key="x")
        report = against(local, cases, server)
    finally:
        running.stop()
    assert report.layer == "log-probabilities"
    assert (report.causes[0].name, report.causes[0].certain) == (named, False)


@pytest.mark.slow
def test_an_endpoint_that_reads_pictures_wrongly(local: Pipeline, cases: list[Case]) -> None:
    """qvl's own requests do not show it, since their pictures are upright and opaque; its probes do."""
    with served("exif,alpha") as name:
        report = against(local, cases[:3], at(name))
    assert report.layer is None
    assert [cause.name for cause in report.causes] == ["exif", "alpha"]
    assert "EXIF" in report.causes[0].evidence
    assert "black" in report.causes[1].evidence


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["exif", "alpha"])
def test_a_host_that_reads_pictures_wrongly(pictures: list[Path], tmp_path: Path, fault: str) -> None:
    """Recorded on a host with the fault, checked on one without: the pixels part, and the cause is known by them."""
    for place, path in enumerate(pictures[:2]):
        with Image.open(path) as image:
            if fault == "exif":
                exif = Image.Exif()
                exif[0x0112] = 3 if place else 6
                image.save(tmp_path / f"{place}.jpg", exif=exif)
            else:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
                image.save(tmp_path / f"{place}.png")
    asked = [*("--pictures", str(tmp_path / "*.*g")), "-q", QUESTION, "--device", "cpu", "-O", "dtype=float32"]
    golden = tmp_path / "golden.jsonl.gz"
    program = [sys.executable, "-m", "tests.parity.faulty", fault, "qvl.cli", "parity", "record", "bundled"]
    subprocess.run([*program, *asked, "-o", str(golden)], check=True)
    check = [sys.executable, "-m", "qvl.cli", "parity", "check", "bundled", str(golden)]
    done = subprocess.run(
        [*check, "--device", "cpu", "-O", "dtype=float32", "--budget", "text=0.5"], capture_output=True, text=True
    )
    assert "first layer that parts: pixels, in 2 of 2 cases" in done.stdout
    assert {"exif": "EXIF orientation is not applied", "alpha": "alpha is laid on another colour"}[fault] in done.stdout
    assert "A reads" in done.stdout
