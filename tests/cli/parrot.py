"""A plugin with a backend that needs no weights; the tests install it as a package of its own."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import qvl
from qvl.backends.base import Backend, Capabilities
from qvl.errors import BackendUnavailableError, ContextLengthError
from qvl.types import ChatRequest, Chunk, SamplingParams, TokenLogprob, Usage

CONTEXT = 4096


class Parrot(Backend):
    """Says the size of every picture, or an analysis with it; `:slow`, `:stuck`, `:down` and `:mute` behave like it."""

    name = "parrot"

    def __init__(self, model: str, *, device: str = "cpu", suffix: str = "") -> None:
        self.model = model
        self.device = device
        self.suffix = suffix

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=8, max_context=CONTEXT, sampling=SamplingParams.names(), response_formats=frozenset({"json_schema"})
        )

    def identity(self) -> dict[str, Any]:
        return {"backend": self.name, "model": self.model, "suffix": self.suffix}

    async def open(self) -> None:
        if self.model == "down":
            raise BackendUnavailableError("nothing listens", hint="start it")

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        needed = len(request.messages[-1].text) // 4 + (request.sampling.max_tokens or 16)
        if needed > CONTEXT:
            raise ContextLengthError(f"{needed} tokens, the context has {CONTEXT}", hint="lower max_tokens")
        if self.model == "slow":
            await asyncio.sleep(0.4)
        if self.model == "stuck":
            Path("asked").write_text("yes")
            await asyncio.sleep(3600)
        words = self._answer(request).split(" ")
        for number, word in enumerate(words):
            text = word if number == 0 else " " + word
            await asyncio.sleep(0)
            yield Chunk(text=text, logprobs=(TokenLogprob(text, math.log(0.5), text.encode()),))
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=len(words)))

    def _answer(self, request: ChatRequest) -> str:
        sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in request.pictures)
        if self.model == "mute":
            return "I would rather not say."
        if request.response_format.kind != "json_schema":
            return f"{sizes}: {request.messages[-1].text}{self.suffix}"
        schema = request.response_format.schema or {}
        if "total" in schema["properties"]:
            return json.dumps({"total": 12.5, "seller": sizes})
        return json.dumps({"brand": "NORVIK", "category": "mug", "attributes": {"size": sizes}})


@qvl.hookimpl
def register_backends(register: Callable[[str, Any], None]) -> None:
    register("parrot", Parrot)
