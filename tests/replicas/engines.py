"""Backends for the replicas of the tests; they travel to other processes, so they stand in a module."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

from qvl.errors import ConfigError
from qvl.testing import EchoBackend
from qvl.types import ChatRequest, Chunk, Usage

WHO = "who?"


class Marked(EchoBackend):
    """An echo that answers `WHO` with its process and what it may see."""

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        if request.messages[-1].text == WHO:
            seen = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "-")
            yield Chunk(text=f"{os.getpid()} {seen}")
            yield Chunk(finish_reason="stop", usage=Usage(1, 1))
            return
        async for chunk in super()._say(request):
            yield chunk


class Unopenable(EchoBackend):
    async def open(self) -> None:
        raise ConfigError("the weights are not there", hint="look in the cellar")


class Broken(EchoBackend):
    """One that raises what is none of qvl's errors."""

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(text="so far ")
        raise KeyError("a bug")
