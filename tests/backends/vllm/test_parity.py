"""No difference is found between the local engine and vLLM, both computing in float32."""

from __future__ import annotations

import random
from pathlib import Path

from qvl import Pipeline
from qvl.backends.vllm.backend import VllmBackend
from qvl.decisions.questions import read_questions
from qvl.parity import Case, compare
from qvl.tiny import render
from tests.backends.vllm.conftest import SETTINGS

PICTURES = 12


def test_local_and_vllm_part_nowhere(tmp_path: Path) -> None:
    asked = read_questions([{"type": "predicate", "instructions": "Is it a mug?"}])
    cases = []
    for seed in range(PICTURES):
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
    assert report.agreement["text"].agree == 2 * PICTURES
    assert report.agreement["decisions"].agree == PICTURES
