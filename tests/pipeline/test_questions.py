"""What is no question is told before anything is loaded, with the way out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.errors import ConfigError, MediaError

from .conftest import TalkingBackend


@pytest.mark.parametrize(("question", "word"), [("", "empty"), (" \n", "empty"), (None, "NoneType"), (7, "int")])
def test_an_empty_question_is_refused(picture: Image.Image, question: Any, word: str) -> None:
    backend = TalkingBackend()

    async def ask() -> None:
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            await pipe.ask(picture, question)

    with Pipeline(backend=backend, cache="off") as pipe:
        for asking in (lambda: pipe.ask(picture, question), lambda: list(pipe.stream(picture, question))):
            with pytest.raises(ConfigError, match=rf"the question is .*{word} .ask.pictures, question"):
                asking()
    with pytest.raises(ConfigError, match=word):
        asyncio.run(ask())
    assert backend.requests == []


@pytest.mark.parametrize("question", ["what brand?", "是什么牌子？", "Describe the product."])
def test_a_question_where_the_picture_belongs_is_told(picture: Image.Image, tmp_path: Path, question: str) -> None:
    shoe = tmp_path / "shoe.jpg"
    picture.save(shoe)
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
        with pytest.raises(MediaError, match=r"no such file: .*a question comes last, after the pictures"):
            pipe.ask(question, str(shoe))
        with pytest.raises(MediaError, match="looked from"):
            pipe.ask("my shoe.jpg", "what brand?")
