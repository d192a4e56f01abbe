"""Backends for the replicas of the tests; they travel to other processes, so they stand in a module."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvl.backends.base import Capabilities
from qvl.errors import ConfigError, EngineDeadError
from qvl.plugins.hookspecs import hookimpl
from qvl.testing import EchoBackend
from qvl.types import ChatRequest, Chunk, Usage

WHO = "who?"
DEADLY_SIZE = 40


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


class Watching(EchoBackend):
    """One that takes videos, and answers with the number of their frames and the bytes of their files."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, videos=4)

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        shown = sum(len(video.frames) for video in request.videos), sum(len(video.data) for video in request.videos)
        yield Chunk(text=f"{shown[0]} frames, {shown[1]} bytes")
        yield Chunk(finish_reason="stop", usage=Usage(1, 1))


class Unopenable(EchoBackend):
    async def open(self) -> None:
        raise ConfigError("the weights are not there", hint="look in the cellar")


class Broken(EchoBackend):
    """One that raises what is none of qvl's errors."""

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(text="so far ")
        raise KeyError("a bug")


class Doomed(EchoBackend):
    """One whose engine is dead, and which is found healthy all the same."""

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        raise EngineDeadError("the device is lost")
        yield


class Deadly(EchoBackend):
    """One whose process ends by SIGKILL at a picture of 40 x 40 pixels; the others take their time."""

    def __init__(self) -> None:
        super().__init__(pause=0.02)

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super()._say(request):
            yield chunk
            if any(picture.width == picture.height == DEADLY_SIZE for picture in request.pictures):
                os.kill(os.getpid(), signal.SIGKILL)


class Counted(EchoBackend):
    """An echo that notes every answer in a file; files say that it ends its process once, or waits for a second one."""

    name = "counted"

    def __init__(self, model: str = "counted", *, notes: str, device: str = "cpu", pause: float = 0.0) -> None:
        super().__init__(model, pause=pause)
        self.notes = Path(notes)

    def _processes(self) -> set[str]:
        return {text.split()[0] for path in self.notes.glob("answer-*") if (text := path.read_text())}

    def identity(self) -> dict[str, Any]:
        return {"backend": self.name, "model": self.model}

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        last, gone = self.notes / "kill-once", self.notes / "killed"
        if len(list(self.notes.glob("answer-*"))) >= 5 and str(os.getpid()) in self._processes() and last.exists():
            last.rename(gone)
            os.kill(os.getpid(), signal.SIGKILL)
        (self.notes / f"answer-{uuid.uuid4()}").write_text(f"{os.getpid()} {request.pictures[0].sha256}")
        # Left alone, one would have answered everything before another process is there.
        wanted = 3 if gone.exists() else 2 if (self.notes / "wait-for-two").exists() else 1
        end = time.monotonic() + 240
        while len(self._processes()) < wanted and time.monotonic() < end:
            await asyncio.sleep(0.05)
        async for chunk in super()._say(request):
            yield chunk


class Plugin:
    """Makes `counted:NAME` a model."""

    @hookimpl
    def register_backends(self, register: Callable[[str, Any], None]) -> None:
        register("counted", Counted)
