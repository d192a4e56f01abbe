"""Helpers of the backend contract suite, which tests of adapters can use too: requests, waits, checks."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from qvl.backends.base import Backend
from qvl.errors import UnsupportedInputError
from qvl.types import ChatRequest, Chunk, ImagePart, Message, Part, SamplingParams, TextPart, VideoPart

if TYPE_CHECKING:
    from qvl.media.picture import Picture
    from qvl.media.video import Video

Test = TypeVar("Test", bound=Callable[..., Coroutine[object, None, None]])


@dataclass(frozen=True)
class Sight:
    """A vision test: pictures by name, a question, and a function that finds the names in an answer."""

    pictures: dict[str, Picture]
    question: str
    names_in: Callable[[str], list[str]]


def in_loop(test: Test) -> Test:
    """Runs an async test in the loop of its class, so that a backend that is slow to open is opened once."""

    @functools.wraps(test)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        self.loop.run_until_complete(asyncio.wait_for(test(self, *args, **kwargs), self.patience))

    return run  # type: ignore[return-value]


def ask(question: str, *pictures: Picture, **sampling: Any) -> ChatRequest:
    """Return a request of one user message: the pictures, then the question."""
    parts: tuple[Part, ...] = (*(ImagePart(picture) for picture in pictures), TextPart(question))
    return ChatRequest((Message("user", parts),), SamplingParams(**sampling))


def watch(question: str, *videos: Video, **sampling: Any) -> ChatRequest:
    """Return a request of one user message: the videos, then the question."""
    parts: tuple[Part, ...] = (*(VideoPart(video) for video in videos), TextPart(question))
    return ChatRequest((Message("user", parts),), SamplingParams(**sampling))


def clip(frames: int) -> Video:
    """Return a red video of a second, of which so many frames are shown (at most 8); it needs no PyAV."""
    from qvl.media.video import Video

    data = (files("qvl.backends.openai") / "probe_clip.webm").read_bytes()
    times = tuple(number / 8 for number in range(frames))
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Video(digest, (square((208, 32, 32)),) * frames, times, 1.0, 8.0, "<clip>", data)


def endless(backend: Backend, question: str, max_tokens: int = 400) -> ChatRequest:
    """Return a request that is answered with `max_tokens` tokens, if the backend can be made to go on that long."""
    more = {"ignore_eos": True} if "ignore_eos" in backend.capabilities.sampling else {}
    return ask(question, max_tokens=max_tokens, **more)


def square(colour: tuple[int, int, int] = (220, 30, 30), edge: int = 64) -> Picture:
    """Return a picture of one colour."""
    from PIL import Image

    from qvl.media import gate

    return gate.load(Image.new("RGB", (edge, edge), colour))


async def collect(backend: Backend, request: ChatRequest) -> list[Chunk]:
    async with aclosing(backend.stream(request)) as chunks:
        return [chunk async for chunk in chunks]


async def drain(stream: AsyncGenerator[Chunk, None]) -> None:
    async for _ in stream:
        await asyncio.sleep(0)


async def refused(backend: Backend, request: ChatRequest, param: str) -> None:
    """Assert that the request is refused before any work, with the field in `param`."""
    with pytest.raises(UnsupportedInputError) as caught:
        await backend.generate(request)
    assert caught.value.param == param


async def idle(backend: Backend, within: float = 20.0) -> None:
    """Wait until the backend runs no request; an abort may take a step of the engine."""
    end = time.monotonic() + within
    while backend.stats().get("num_running", 0) or backend.stats().get("num_waiting", 0):
        assert time.monotonic() < end, f"still running: {dict(backend.stats())}"
        await asyncio.sleep(0.01)
