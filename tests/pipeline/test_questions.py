"""What is not a question is told before anything is loaded, with the way out."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.backends.base import Capabilities
from qvl.errors import ConfigError, MediaError, RequestError
from qvl.types import ChatRequest, Chunk

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


@pytest.mark.parametrize(("cache", "words"), [(False, 'cache="off" for none'), (Path("answers.db"), r"str\(path\)")])
def test_what_names_no_cache_is_not_taken_for_the_default_one(cache: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Pipeline(backend=TalkingBackend(), cache=cache)


def test_no_cache_for_one_question_is_told_its_name(picture: Image.Image) -> None:
    told = r"unknown cache mode False .one of auto, always, off"
    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe, pytest.raises(ConfigError, match=told):
        pipe.ask(picture, "q", cache=False)  # type: ignore[arg-type]


def test_too_few_pixels_are_refused_by_every_verb(picture: Image.Image) -> None:
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
        for asking in (lambda: pipe.ask(picture, "q", max_pixels=3), lambda: pipe.analyze(picture, max_pixels=3)):
            with pytest.raises(ConfigError, match="max_pixels=3 is too small"):
                asking()


def test_who_changes_extra_while_the_request_waits_changes_nothing() -> None:
    sent: list[Any] = []

    class Noting(TalkingBackend):
        @property
        def capabilities(self) -> Capabilities:
            return dataclasses.replace(super().capabilities, extra_body=True)

        async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
            sent.append(copy.deepcopy(request.extra))
            async for chunk in super().stream(request):
                yield chunk

    async def ask() -> None:
        async with AsyncPipeline(backend=Noting(), cache="memory:") as pipe:
            pipe.executor.admit = changing
            await pipe.chat([{"role": "user", "content": "q"}], extra=extra)

    @contextlib.asynccontextmanager
    async def changing(_job: Any) -> AsyncGenerator[None, None]:
        extra["seat"], extra["deep"]["row"] = 2, 2
        yield

    extra: dict[str, Any] = {"seat": 1, "deep": {"row": 1}}
    asyncio.run(ask())
    assert sent == [{"seat": 1, "deep": {"row": 1}}]
    assert extra["seat"] == 2


def test_an_extra_that_cannot_be_sent_is_one_line() -> None:
    told = r"extra cannot be sent.*pass only JSON values"
    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe, pytest.raises(RequestError, match=told):
        pipe.chat([{"role": "user", "content": "q"}], extra={"lock": threading.Lock()})
