"""No difference is found between the local engine and vLLM, both computing in float32."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qvl import Pipeline
from qvl.backends.vllm.backend import VllmBackend
from qvl.decisions.questions import read_questions
from qvl.parity import Case, compare
from qvl.tiny import render
from tests.backends.vllm.conftest import SETTINGS

PICTURES = 100
ANALYSED = 12


def test_local_and_vllm_part_nowhere(tmp_path: Path) -> None:
    asked = read_questions([{"type": "predicate", "instructions": "Is it a mug?"}])
    cases = []
    for seed in range(ANALYSED):
        path = tmp_path / f"{seed}.png"
        render.draw(render.sample_product(random.Random(seed)), seed).save(path)
        cases += [
            Case(f"{seed}#q", (path,), question="What is the brand?"),
            Case(f"{seed}#a", (path,)),
            Case(f"{seed}#d", (path,), questions=asked),
        ]
    with (
        Pipeline(device="cpu", dtype="float32", cache="off") as local,
        Pipeline(backend=VllmBackend(**SETTINGS), cache="off", concurrency=8) as vllm,
    ):
        report = compare(local, vllm, cases)
    assert report.layer is None, report.lines()
    assert report.causes == []
    shown = {"pixels", "picture tokens", "template", "prompt", "log-probabilities", "text", "fields", "decisions"}
    assert shown <= {*report.shown}
    assert report.agreement["text"].agree == 2 * ANALYSED
    assert report.agreement["decisions"].agree == ANALYSED


@pytest.mark.timeout(1200)
def test_the_command_finds_nothing_on_a_hundred_pictures(tmp_path: Path) -> None:
    for seed in range(PICTURES):
        size = (448, 320) if seed % 2 else (320, 320)
        render.draw(render.sample_product(random.Random(seed)), seed, size=size).save(tmp_path / f"{seed:03}.png")
    options = ",".join(f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()).replace('"', "")
    sides = ["bundled,device=cpu,dtype=float32", f"vllm:bundled,{options}"]
    asked = ["--pictures", str(tmp_path / "*.png"), "-q", "What is the brand?", "-j", "8"]
    command = [sys.executable, "-m", "qvl.cli", "parity", *sides, *asked, "-o", str(tmp_path / "report.json")]
    done = subprocess.run([*command, "--budget", "text=0.95"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["cases"], report["failed"], report["first_layer"]) == (PICTURES, {"both": 0, "one": 0}, None)
    assert report["causes"] == []
    assert report["agreement"]["text"]["agree"] == PICTURES
    assert {one["layer"] for one in report["layers"]} >= {"picture tokens", "template", "prompt", "log-probabilities"}
