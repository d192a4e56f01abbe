"""`map` over many pictures: bounded concurrency, items in input order, errors as items."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Generic, TypeAlias, TypeVar

from qvl.analysis.product import AnalysisResult, ProductAnalysis
from qvl.errors import QvlError
from qvl.evidence.located import Locations
from qvl.evidence.shapes import Located
from qvl.types import Result

S = TypeVar("S")
V = TypeVar("V")
T_co = TypeVar("T_co", covariant=True)
Answered: TypeAlias = "Result | AnalysisResult[object] | Locations"
"""The answer of the pipeline to one picture."""


@dataclass(frozen=True, slots=True)
class MapItem(Generic[T_co]):
    """One picture of a `map`: its `value` (an analysis, a Result or Locations) or its `error`.

    `evidence` is the box of each field of an analysis, where that was asked for. `analysis` has the confidences too, of
    any schema.
    """

    index: int
    source: object
    value: T_co | None = None
    result: Result | None = None
    error: QvlError | None = None
    evidence: Mapping[str, Located | None] = field(default_factory=dict)
    analysis: AnalysisResult[T_co] | None = None

    @property
    def ok(self) -> bool:
        """True if the item was processed without an error."""
        return self.error is None


def unwrapped(item: MapItem[Answered], loading: float, *, keep_pictures: bool) -> MapItem[object]:
    """Return `item` with the value that its user gets; without its pictures, unless `keep_pictures`.

    `loading` are seconds of model loading to add to its times.
    """
    answered, result = item.value, item.result
    if answered is None or result is None:
        return replace(item, value=None)
    timing = result.timing
    if loading:
        timing = replace(timing, loading=timing.loading + loading, total=timing.total + loading)
    result = replace(result, timing=timing, pictures=result.pictures if keep_pictures else ())
    value: object = result
    evidence: Mapping[str, Located | None] = {}
    analysis: AnalysisResult[object] | None = None
    if isinstance(answered, AnalysisResult):
        value, evidence, analysis = answered.value, answered.evidence, replace(answered, result=result)
        if isinstance(value, ProductAnalysis):
            value.came_from(result)
    elif isinstance(answered, Locations):
        value = Locations(answered, result)
    return MapItem(item.index, item.source, value, result, evidence=evidence, analysis=analysis)


async def map_in_order(
    sources: Iterable[S], one: Callable[[S], Awaitable[tuple[V, Result | None]]], concurrency: int, progress: bool
) -> AsyncGenerator[MapItem[V], None]:
    """Run `one` over `sources`, at most `concurrency` at a time, and yield the items in input order.

    Sources are read lazily, so an endless iterable is fine. At most 4 x `concurrency` finished items are buffered
    behind a slower one.
    """
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=len(sources) if isinstance(sources, Sized) else None, unit="picture", file=sys.stderr)
    gate = asyncio.Semaphore(concurrency)
    window: deque[asyncio.Task[MapItem[V]]] = deque()

    async def run(index: int, source: S) -> MapItem[V]:
        async with gate:
            try:
                value, result = await one(source)
                item: MapItem[V] = MapItem(index, source, value, result)
            except QvlError as exc:
                item = MapItem(index, source, error=exc)
        if bar is not None:
            bar.update()
        return item

    try:
        for index, source in enumerate(sources):
            window.append(asyncio.create_task(run(index, source)))
            while len(window) >= 4 * concurrency or (window and window[0].done()):
                yield await window.popleft()
        while window:
            yield await window.popleft()
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)
        if bar is not None:
            bar.close()
