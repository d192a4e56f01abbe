"""The two sides of a comparison: a pipeline that is asked, or what was recorded of one elsewhere."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

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
    """

    def __init__(self, source: SideLike, request: JsonMapping) -> None:
        self.pipeline = source if isinstance(source, AsyncPipeline | Pipeline) else AsyncPipeline(source, cache="off")
        self._owned = isinstance(source, str)
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
        facts = [str(self.identity[name]) for name in ("dtype", "quantisation") if self.identity.get(name)]
        self.label = ", ".join([f"{self.backend.name}:{self.backend.model}", *facts])

    async def aclose(self) -> None:
        """Close the pipeline if it was made here."""
        if self._owned and isinstance(self.pipeline, AsyncPipeline):
            await self.pipeline.aclose()

    async def observe(self, case: Case, *, salt: str = "") -> Observation:
        if isinstance(self.pipeline, Pipeline):
            # A blocking pipeline has a loop of its own, on which its backend lives.
            loop, inner = self.pipeline._loop, self.pipeline.pipeline
            return await asyncio.to_thread(lambda: loop.call(observe, inner, case, self._request, salt=salt))
        return await observe(self.pipeline, case, self._request, salt=salt)


class RecordedSide(ParitySide):
    """A side that was recorded: `record` has an observation of each case."""

    def __init__(self, record: RecordFile) -> None:
        self.record = record
        self.label = str(record.header["model"])
        self.identity: JsonObject = dict(record.header["identity"])

    async def observe(self, case: Case, *, salt: str = "") -> Observation:
        return self.record.get(case.id)
