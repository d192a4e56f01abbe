"""Causes beside the eight planted faults, each made for real: in a checkpoint's files, an adapter, or an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qvl import Pipeline
from qvl.parity import Case
from qvl.tiny import WEIGHTS
from tests.backends.lora_files import random_adapter
from tests.parity import checkpoints
from tests.parity.processes import served
from tests.parity.test_planted import against, at, other


def names(report: object) -> list[tuple[str, str, bool]]:
    return [(cause.name, cause.layer, cause.certain) for cause in report.causes]


def test_another_revision_of_the_tokenizer(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    report = against(local, cases[:2], other(checkpoints.with_another_tokenizer(tmp_path / "m")))
    assert report.layer == "prompt"
    assert names(report) == [("tokenizer", "prompt", True)]
    assert "tokenizer.json" in report.causes[0].remedy


def test_another_pixel_budget(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    report = against(local, cases[:2], other(checkpoints.with_another_budget(tmp_path / "m")))
    assert report.layer == "picture tokens"
    assert names(report) == [("budget", "picture tokens", True)]
    assert "max_pixels" in report.causes[0].remedy


def test_another_token_that_ends_answers(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    tokens = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    (stop,) = tokens.encode(".", add_special_tokens=False).ids
    asked = [Case("described", cases[0].pictures, question="Describe this picture.")]
    report = against(local, asked, other(checkpoints.with_another_end(tmp_path / "m", stop)))
    assert report.layer == "text"
    assert names(report) == [("stop", "text", True)]
    assert "eos_token_id" in report.causes[0].remedy


@pytest.mark.slow
def test_an_adapter_that_one_side_lacks(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    texts = [case for case in cases if case.kind == "text"]
    report = against(local, texts, other(adapter=str(random_adapter(tmp_path / "lora", seed=1))))
    assert report.layer == "log-probabilities"
    assert names(report) == [("adapter", "log-probabilities", True)]
    assert "A has adapter None" in report.causes[0].evidence


@pytest.mark.slow
def test_an_adapter_that_the_endpoint_lacks_is_likely(cases: list[Case], tmp_path: Path) -> None:
    texts = [case for case in cases if case.kind == "text"]
    adapted = other(adapter=str(random_adapter(tmp_path / "lora", seed=1)))
    with adapted, served() as name:
        report = against(adapted, texts, at(name))
    assert report.layer == "log-probabilities"
    assert names(report)[0] == ("adapter", "log-probabilities", False)


@pytest.mark.slow
def test_a_batch_in_bfloat16(cases: list[Case]) -> None:
    texts = [case for case in cases if case.kind == "text"]
    with other(dtype="bfloat16", concurrency=1) as alone:
        report = against(alone, texts, other(dtype="bfloat16", concurrency=8))
    # Whether the numbers part, and by which of the two, depends on the processor's kernels.
    assert (report.layer is None) == (report.causes == [])
    assert {cause.name for cause in report.causes} <= {"batch", "prefix-cache", "kernels"}


@pytest.mark.slow
def test_a_prefix_cache_that_takes_one_picture_for_another(local: Pipeline, cases: list[Case]) -> None:
    texts = [case for case in cases if case.kind == "text"]
    with served("prefix") as name:
        report = against(local, texts, at(name))
    assert report.layer in ("log-probabilities", "text")
    assert names(report) == [("prefix-cache", "log-probabilities", True)]
