"""Pictures that the bundled model reads, and pipelines of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl import Pipeline
from qvl.parity import Case
from qvl.tiny import render

QUESTION = "What is the brand?"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for seed in range(5):
        paths.append(folder / f"{seed}.png")
        render.draw(render.sample_product(random.Random(seed)), seed).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def cases(pictures: list[Path]) -> list[Case]:
    asked = [Case(f"{path.stem}#q", (path,), question=QUESTION) for path in pictures]
    return asked + [Case(f"{path.stem}#a", (path,)) for path in pictures]


@pytest.fixture(scope="module")
def local() -> Iterator[Pipeline]:
    with Pipeline(device="cpu", dtype="float32", cache="off") as pipe:
        yield pipe
