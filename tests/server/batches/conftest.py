"""A server that keeps files, and OpenAI's client for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.server.conftest import Running


@pytest.fixture
def running(serve: Callable[..., Running], tmp_path: Path) -> Running:
    return serve(batch_dir=tmp_path / "batches", cache=None)


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    """Makes clients that are closed with the test."""
    made: list[openai.OpenAI] = []

    def make(running: Running, key: str = "none") -> openai.OpenAI:
        made.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def client(running: Running, connect: Callable[..., openai.OpenAI]) -> openai.OpenAI:
    return connect(running)
