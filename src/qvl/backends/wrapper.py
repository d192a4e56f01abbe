"""A base class for backends that wrap another one and pass everything through."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from qvl.backends.base import Backend, Capabilities, OwnDecisions, Tokens
from qvl.backends.token_table import TokenTable
from qvl.evidence.coordinates import Coordinates
from qvl.types import ChatRequest, Chunk, JsonObject


class WrappingBackend(Backend):
    """Has the name and model of the backend `inner`, delegates everything to it, and opens and closes it."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name, self.model = inner.name, inner.model
        self.wants_pixels = inner.wants_pixels
        self.engines_may_come = inner.engines_may_come
        self.splits_thought = inner.splits_thought

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    @property
    def coordinates(self) -> Coordinates:
        return self.inner.coordinates

    def refuse_missing(self) -> None:
        self.inner.refuse_missing()

    async def open(self) -> None:
        await self.inner.open()
        # An inner backend may learn its model's name only now.
        self.model = self.inner.model

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def tokenize(self, prompt: ChatRequest | str, *, texts: bool = False) -> Tokens:
        return await self.inner.tokenize(prompt, texts=texts)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return await self.inner.detokenize(ids)

    async def token_table(self) -> TokenTable | None:
        return await self.inner.token_table()

    async def own_decisions(self) -> OwnDecisions | None:
        return await self.inner.own_decisions()

    def identity(self) -> JsonObject:
        return self.inner.identity()

    def peek_identity(self) -> JsonObject | None:
        return self.inner.peek_identity()

    def peek_capabilities(self) -> Capabilities | None:
        return self.inner.peek_capabilities()

    def adapters(self) -> Mapping[str, str]:
        return self.inner.adapters()

    def stats(self) -> Mapping[str, float]:
        return self.inner.stats()

    def unready(self) -> str | None:
        return self.inner.unready()

    def lost(self) -> str | None:
        return self.inner.lost()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self.inner.stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk
