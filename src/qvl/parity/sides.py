"""The two sides of a comparison: a pipeline that is asked, or what was recorded of one elsewhere."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

from qvl.errors import ConfigError
from qvl.parity.observe import observe
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.sync_pipeline import Pipeline

if TYPE_CHECKING:
    from qvl.backends.base import Backend
    from qvl.parity.case import Case
    from qvl.parity.observation import Observation
    from qvl.parity.record_file import RecordFile
    from qvl.types import JsonMapping, JsonObject

SideLike: TypeAlias = "str | Pipeline | AsyncPipeline"


class ParitySide(ABC):
    """One side: who answers, and what it shows of a case."""

    label: str
    identity: JsonMapping

    @abstractmethod
    async def observe(self, case: Case, *, salt: str = "") -> Observation:
        """Return what the side shows of `case`, asked anew or as it was recorded."""


class LiveSide(ParitySide):
    """A pipeline that is asked; one that is named by a text is made, opened and closed here.

    Args:
        source: a pipeline, or the name of a model as Pipeline takes it.
        request: parameters of every request, as of `ask`.

    Attributes:
        owned: whether the pipeline was made here, and is closed here.

    Raises:
        ConfigError: an unknown name, or `cache` in the request.
    """

    def __init__(self, source: SideLike, request: JsonMapping) -> None:
        self.pipeline = source if isinstance(source, AsyncPipeline | Pipeline) else AsyncPipeline(source, cache="off")
        if "cache" in request:
            raise ConfigError("a comparison asks anew, so its request cannot have 'cache'", hint="leave it out")
        self.owned = isinstance(source, str)
        self._request = request
        self.label = self._inner.backend.name
        self.identity = {}

    @property
    def _inner(self) -> AsyncPipeline:
        return self.pipeline.pipeline if isinstance(self.pipeline, Pipeline) else self.pipeline

    @property
    def backend(self) -> Backend:
        return self._inner.backend

    @property
    def language(self) -> str:
        return self._inner.language

    @property
    def concurrency(self) -> int:
        return self._inner.concurrency

    async def open(self) -> None:
        """Load and connect; `label` and `identity` are known then."""
        if isinstance(self.pipeline, Pipeline):
            await asyncio.to_thread(self.pipeline.open)
        else:
            await self.pipeline.open()
        self.identity = self.backend.identity()
        self.label = shown_model(self.backend)

    async def refuse_missing(self) -> None:
        """Raise what `open` would raise, as far as it is seen at once."""
        await asyncio.to_thread(self.backend.refuse_missing)

    async def aclose(self) -> None:
        """Close the pipeline if it was made here."""
        if self.owned and isinstance(self.pipeline, AsyncPipeline):
            await self.pipeline.aclose()

    async def observe(self, case: Case, *, salt: str = "") -> Observation:
        if isinstance(self.pipeline, Pipeline):
            # A blocking pipeline has a loop of its own, on which its backend lives.
            loop, inner = self.pipeline._loop, self.pipeline.pipeline
            return await asyncio.to_thread(lambda: loop.call(observe, inner, case, self._request, salt=salt))
        return await observe(self.pipeline, case, self._request, salt=salt)


def shown_model(backend: Backend) -> str:
    """Return the name of an open backend and its model, where it is, and what else it tells of its numbers."""
    told = backend.identity()
    facts = [str(told[name]) for name in ("dtype", "quantisation") if told.get(name)]
    where = told.get("endpoints")
    places = [f"at {', '.join(map(str, where))}"] if isinstance(where, list) else []
    return ", ".join([f"{backend.name}:{backend.model}", *places, *facts])


class RecordedSide(ParitySide):
    """A side that was recorded: `record` has an observation of each case."""

    def __init__(self, record: RecordFile) -> None:
        self.record = record
        self.label = str(record.header["model"])
        self.identity: JsonObject = dict(record.header["identity"])

    async def observe(self, case: Case, *, salt: str = "") -> Observation:
        return self.record.get(case.id)
