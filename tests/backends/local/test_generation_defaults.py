"""Of generation_config.json the ends of an answer are taken; how to sample is what the request says, or greedy."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.backends.local.requests import ask

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backends.local.conftest import Opener

CARD = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.5}


QUESTION = ask("Describe the picture.", 3, max_tokens=16, return_token_ids=True)


@pytest.fixture
def folder(tmp_path: Path, random_folder: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(random_folder, copy)
    return copy


@pytest.fixture
def greedy(opened: Opener, random_folder: Path) -> tuple[int, ...]:
    return asyncio.run(opened(random_folder).generate(QUESTION)).choices[0].token_ids


def recommend(folder: Path, **settings: object) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_request_that_names_none_is_greedy(opened: Opener, greedy: tuple[int, ...], folder: Path) -> None:
    recommend(folder, **CARD)
    backend = opened(folder)
    assert asyncio.run(backend.generate(QUESTION)).choices[0].token_ids == greedy
    named = replace(QUESTION.sampling, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5, seed=5)
    assert asyncio.run(backend.generate(QUESTION.replace(sampling=named))).choices[0].token_ids != greedy


def test_its_ends_of_an_answer_are_taken(opened: Opener, greedy: tuple[int, ...], folder: Path) -> None:
    end = next(token for number, token in enumerate(greedy) if number and token not in greedy[:number])
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    recommend(folder, eos_token_id=[*(ends if isinstance(ends, list) else [ends]), end])
    choice = asyncio.run(opened(folder).generate(QUESTION)).choices[0]
    assert choice.finish_reason == "stop"
    assert [token for token in choice.token_ids if token != end] == list(greedy[: greedy.index(end)])
