"""On a hundred pictures the command names each of eight faults at its layer, and finds none where there is none."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl.tiny import render
from tests.parity import checkpoints
from tests.parity.conftest import QUESTION
from tests.parity.processes import command, served

PICTURES = 100
FLOAT32 = "device=cpu,dtype=float32"
LOCAL = f"bundled,{FLOAT32}"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def drawn(number: int) -> Image.Image:
    size = (448, 320) if number % 2 else (320, 320)
    return render.draw(render.sample_product(random.Random(number)), number, size=size)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    for number in range(PICTURES):
        drawn(number).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As cameras and designers store them: half lie on their side with an orientation, half have alpha."""
    folder = tmp_path_factory.mktemp("stored")
    for number in range(PICTURES):
        image = drawn(number)
        if number % 2:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(folder / f"{number:03}.jpg", exif=exif)
        else:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(folder / f"{number:03}.png")
    return folder


def parity(folder: Path, b: str, *more: str) -> Any:
    """The report of the command; it must compare all pictures."""
    asked = ("--pictures", str(folder / "*.*g"), "-q", QUESTION)
    words = command("qvl.cli", "parity", LOCAL, b, *asked, "--json", *more)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["cases"] % PICTURES == 0
    assert report["failed"] == {"both": 0, "one": 0}
    return report


def named(report: Any) -> list[tuple[str, str]]:
    return [(cause["name"], cause["layer"]) for cause in report["causes"]]


def test_a_patch_size_of_14(shop: Path, tmp_path: Path) -> None:
    report = parity(shop, f"{checkpoints.with_patches_of_14(tmp_path / 'm')},{FLOAT32}")
    assert report["first_layer"] == "picture tokens"
    assert {name for name, _ in named(report)} == {"patch"}


def test_another_template(shop: Path, tmp_path: Path) -> None:
    folder = checkpoints.with_template(
        tmp_path / "m", lambda text: text.replace("'<|im_start|>' + message.role", "'<|im_start|> ' + message.role")
    )
    report = parity(shop, f"{folder},{FLOAT32}")
    assert (report["first_layer"], named(report)) == ("template", [("template", "template")])


def test_bfloat16(shop: Path) -> None:
    report = parity(shop, "bundled,device=cpu,dtype=bfloat16")
    assert (report["first_layer"], named(report)) == ("log-probabilities", [("dtype", "log-probabilities")])


def test_int8(shop: Path) -> None:
    report = parity(shop, f"{LOCAL},quantize=int8")
    assert (report["first_layer"], named(report)) == ("log-probabilities", [("quantisation", "log-probabilities")])


def test_one_other_layer(shop: Path, tmp_path: Path) -> None:
    report = parity(shop, f"{checkpoints.with_another_layer(tmp_path / 'm')},{FLOAT32}")
    assert (report["first_layer"], named(report)) == ("log-probabilities", [("weights", "log-probabilities")])


def test_sampling(shop: Path) -> None:
    with served("sampling") as b:
        report = parity(shop, b)
    assert (report["first_layer"], named(report)) == ("text", [("sampling", "text")])


@pytest.mark.parametrize("fault", ["exif", "alpha"])
def test_an_endpoint_that_reads_pictures_wrongly(stored: Path, fault: str) -> None:
    """The answers to qvl are the same, since its pictures are upright and opaque; the cause is named all the same."""
    with served(fault) as b:
        report = parity(stored, b)
    assert (report["first_layer"], named(report)) == (None, [(fault, "pixels")])


@pytest.mark.parametrize(("fault", "title"), [("exif", "EXIF orientation"), ("alpha", "alpha is laid on another")])
def test_a_host_that_reads_pictures_wrongly(stored: Path, tmp_path: Path, fault: str, title: str) -> None:
    golden = str(tmp_path / "golden.jsonl.gz")
    asked = ("--pictures", str(stored / "*.*g"), "-q", QUESTION, "-o", golden)
    recorded = command("qvl.cli", "parity", "record", LOCAL, *asked, faults=fault)
    subprocess.run(recorded, check=True, capture_output=True)
    check = command("qvl.cli", "parity", "check", LOCAL, golden)
    done = subprocess.run(check, capture_output=True, text=True, check=True)
    assert f"first layer that parts: pixels, in {PICTURES // 2} of {PICTURES} cases" in done.stdout
    assert f"cause: {title}" in done.stdout
    assert done.stdout.count("cause: ") == 1


def test_nothing_between_local_and_local(shop: Path) -> None:
    report = parity(shop, LOCAL, "--self-check")
    assert (report["first_layer"], named(report)) == (None, [])
    assert report["self_check"]["same"] == report["self_check"]["cases"] > 0


def test_nothing_between_local_and_a_server_alone_and_in_a_batch(stored: Path) -> None:
    with served() as b:
        for at_once in ("1", "8"):
            report = parity(stored, b, "-j", at_once, "--analyze")
            assert (report["first_layer"], named(report)) == (None, [])
