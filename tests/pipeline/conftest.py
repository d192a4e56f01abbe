from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline
from qvl.backends.base import Backend, Capabilities
from qvl.types import ChatRequest, Chunk, SamplingParams, TokenLogprob, Usage

ANSWER = {"brand": "NORVIK", "category": "mug", "attributes": {"color": "red"}}


class TalkingBackend(Backend):
    """Answers with what `reply` makes of the request, word by word, and counts what happens to it."""

    name = "talking"

    def __init__(
        self,
        model: str = "parrot",
        *,
        reply: Callable[[ChatRequest], str] | None = None,
        formats: frozenset[str] = frozenset({"json_schema"}),
        logprobs: bool = True,
    ) -> None:
        self.model = model
        self.reply = reply or (lambda request: f"{len(request.pictures)}:{request.messages[-1].text}")
        self.requests: list[ChatRequest] = []
        self.running = 0
        self.most_running = 0
        self.aborted = 0
        self.opened = 0
        self.closed = 0
        self.gate: asyncio.Event | None = None
        self._formats = formats
        self._sampling = SamplingParams.names() if logprobs else SamplingParams.names() - {"logprobs"}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(images=8, sampling=self._sampling, response_formats=self._formats)

    async def open(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        finished = False
        try:
            if self.gate is not None:
                await self.gate.wait()
            words = self.reply(request).split(" ")
            for number, word in enumerate(words):
                await asyncio.sleep(0)
                text = word if number == 0 else " " + word
                logprobs = (
                    (TokenLogprob(text, math.log(0.5), text.encode()),) if request.sampling.logprobs is not None else ()
                )
                yield Chunk(text=text, logprobs=logprobs)
            yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=len(words)))
            finished = True
        finally:
            self.running -= 1
            self.aborted += not finished


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (64, 48), "red")


@pytest.fixture
def pictures(tmp_path: Any) -> list[str]:
    paths = []
    for number in range(12):
        path = tmp_path / f"{number:02}.png"
        Image.new("RGB", (40 + number, 40), (number * 20, 10, 10)).save(path)
        paths.append(str(path))
    return paths


def answering(*texts: str) -> Callable[[ChatRequest], str]:
    """A reply function that gives one text after the other, the last one for ever."""
    left = list(texts)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]


def answer_json(**changes: Any) -> str:
    return json.dumps({**ANSWER, **changes}, ensure_ascii=False)


async def until(ready: Callable[[], object]) -> None:
    while not ready():
        await asyncio.sleep(0.001)


def followers(pipe: AsyncPipeline) -> int:
    """How many wait for an answer that is under way."""
    return sum(flight.followers for flight in pipe.executor._board._flights)
