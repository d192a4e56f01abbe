"""Backends that sample otherwise than they are asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing

from qvl.backends.wrapper import WrappingBackend
from qvl.sampling import SamplingParams
from qvl.types import ChatRequest, Chunk


class OwnMindBackend(WrappingBackend):
    """Answers with sampling parameters of its own where `changes` says so."""

    running = 0

    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {}

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.running += 1
        try:
            sampling: SamplingParams = dataclasses.replace(request.sampling, **self.changes(request))
            async with aclosing(self.inner.stream(request.replace(sampling=sampling))) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.running -= 1


class ShorteningBackend(OwnMindBackend):
    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {"max_tokens": 2}


class SamplingBackend(OwnMindBackend):
    """As a server does that applies the checkpoint's generation_config."""

    def changes(self, request: ChatRequest) -> dict[str, object]:
        return {"temperature": 3.0}
