"""`Pipeline`: the signatures of `AsyncPipeline` without `await`, for scripts, notebooks and threads.

One event loop in a daemon thread does the work, so it can be used where a loop is running already (notebooks). The
calling thread loads and hashes pictures and looks up the cache, so a cache hit needs no other thread.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from typing_extensions import TypeVar

from qvl.analysis.product import ProductAnalysis
from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.errors import AnalysisError
from qvl.log import logger
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.call import Call
from qvl.pipeline.job import CacheMiss
from qvl.pipeline.map_results import MapResults
from qvl.pipeline.parse_request import AnalyzeParams, MapParams, RequestParams, question_messages
from qvl.pipeline.portal import _forget_threads, _Loop
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.analysis.product import AnalysisResult
    from qvl.caches.policy import CacheMode
    from qvl.calibration.abstain import AbstainLike
    from qvl.calibration.calibration_file import Calibration
    from qvl.decisions.answers import Decisions
    from qvl.decisions.questions import QuestionLike
    from qvl.evidence.located import Locations
    from qvl.evidence.page_text import ReadForm
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.decide_call import DecideParams
    from qvl.pipeline.locate_call import LocateParams
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import PictureLike, Pictures, Sources
    from qvl.pipeline.read_pages import ReadPage

A = TypeVar("A", default=ProductAnalysis)
R = TypeVar("R")
log = logger("qvl.pipeline")


class Pipeline:
    __doc__ = (AsyncPipeline.__doc__ or "").replace(
        "Ask a model", "Ask a model (blocking; see AsyncPipeline for async code)", 1
    )

    def __init__(
        self,
        model: str | None = None,
        *,
        backend: Backend | None = None,
        cache: str | Cache | None = None,
        cache_mode: CacheMode | None = None,
        cache_ttl: float | None = None,
        namespace: str | None = None,
        language: str | None = None,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        media: MediaPolicy | None = None,
        concurrency: int | None = None,
        calibration: str | PathLike[str] | Calibration | None = None,
        abstain: AbstainLike | None = None,
        plugins: Iterable[object] = (),
        **options: object,
    ) -> None:
        self.pipeline = AsyncPipeline(
            model,
            backend=backend,
            cache=cache,
            cache_mode=cache_mode,
            cache_ttl=cache_ttl,
            namespace=namespace,
            language=language,
            max_pixels=max_pixels,
            min_pixels=min_pixels,
            media=media,
            concurrency=concurrency,
            calibration=calibration,
            abstain=abstain,
            plugins=plugins,
            **options,
        )
        self._loop = _Loop(self.pipeline.executor)
        # Also when it is dropped without close(), and at the interpreter's end: weights must not outlive it.
        weakref.finalize(self, self._loop.close)

    def __repr__(self) -> str:
        return repr(self.pipeline).replace(type(self.pipeline).__name__, type(self).__name__, 1)

    def open(self) -> None:
        self._loop.call(self.pipeline.open)

    def close(self) -> None:
        """Cancel running work, close backend and cache, and stop the loop. Calling it twice is harmless."""
        self._loop.close()

    def ask(
        self,
        pictures: Pictures,
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> Result:
        return self.chat(question_messages(pictures, question, system), cache=cache, **params)

    def stream(
        self,
        pictures: Pictures,
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream(pictures, question, system=system, cache=cache, **params))

    def chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Unpack[RequestParams]
    ) -> Result:
        return self._execute(self.pipeline.chat_call(messages, cache, params))

    def stream_chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Unpack[RequestParams]
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream_chat(messages, cache=cache, **params))

    @overload
    def analyze(self, pictures: Pictures, *, schema: type[A] | None = None, **params: Unpack[AnalyzeParams]) -> A: ...
    @overload
    def analyze(self, pictures: Pictures, *, schema: SchemaLike | None, **params: Unpack[AnalyzeParams]) -> Any: ...
    def analyze(
        self, pictures: Pictures, *, schema: SchemaLike | None = None, **params: Unpack[AnalyzeParams]
    ) -> object:
        return self._analyze(pictures, schema, params).value

    @overload
    def analyze_result(
        self, pictures: Pictures, *, schema: type[A] | None = None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[A]: ...
    @overload
    def analyze_result(
        self, pictures: Pictures, *, schema: SchemaLike | None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[Any]: ...
    def analyze_result(
        self, pictures: Pictures, *, schema: SchemaLike | None = None, **params: Unpack[AnalyzeParams]
    ) -> AnalysisResult[object]:
        return self._analyze(pictures, schema, params)

    def decide(
        self,
        pictures: Pictures,
        questions: QuestionLike | Iterable[QuestionLike],
        context: str | Sequence[MessageLike] | None = None,
        *,
        cache: CacheMode | None = None,
        **params: Unpack[DecideParams],
    ) -> Decisions:
        async def decide() -> Decisions:
            return await self.pipeline.decide(pictures, questions, context, cache=cache, **params)

        self._loop.claim()
        return self._loop.call(decide)

    def locate(
        self,
        picture: PictureLike,
        targets: str | Iterable[str],
        *,
        points: bool = False,
        cache: CacheMode | None = None,
        **params: Unpack[LocateParams],
    ) -> Locations:
        from qvl.pipeline.locate_call import LocateCall

        return self._execute(LocateCall(picture, targets, self.pipeline.executor, cache, params, points=points))

    def read(
        self,
        document: PictureLike,
        *,
        form: ReadForm = "markdown",
        concurrency: int | None = None,
        cache: CacheMode | None = None,
        **params: Unpack[RequestParams],
    ) -> Generator[ReadPage, None, None]:
        return self._iterate(self.pipeline.read(document, form=form, concurrency=concurrency, cache=cache, **params))

    @overload
    def map(self, sources: Sources, question: str, **params: Unpack[MapParams]) -> MapResults[Result]: ...
    @overload
    def map(
        self, sources: Sources, question: None = None, *, schema: type[A] | None = None, **params: Unpack[MapParams]
    ) -> MapResults[A]: ...
    @overload
    def map(
        self, sources: Sources, *, locate: str | Sequence[str], points: bool = False, **params: Unpack[MapParams]
    ) -> MapResults[Locations]: ...
    @overload
    def map(
        self, sources: Sources, question: str | None = None, *, schema: SchemaLike | None, **params: Unpack[MapParams]
    ) -> MapResults[Any]: ...
    def map(
        self,
        sources: Sources,
        question: str | None = None,
        *,
        schema: SchemaLike | None = None,
        locate: str | Sequence[str] | None = None,
        points: bool = False,
        **params: Unpack[MapParams],
    ) -> MapResults[object]:
        wanted = {"question": question, "schema": schema, "locate": locate, "points": points, **params}
        return MapResults(self._iterate(self.pipeline.map(sources, **wanted)))  # type: ignore[call-overload]

    def stats(self) -> Mapping[str, float]:
        return self.pipeline.stats()

    def __enter__(self) -> Pipeline:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _analyze(self, pictures: Pictures, schema: SchemaLike | None, params: AnalyzeParams) -> AnalysisResult[object]:
        from qvl.pipeline.analyze_document import analyze, may_be_long

        call = self.pipeline.analyze_call(pictures, schema, params)
        if not may_be_long(call):
            return self._execute(call)
        self._loop.claim()
        return self._loop.call(analyze, self.pipeline.executor, call)

    def _execute(self, call: Call[R]) -> R:
        """Return the value of `call`; this thread answers cache hits and prepares misses for the backend.

        Work that waits at most for a disk is faster here than a round trip to the loop and its threads.
        """
        executor = self.pipeline.executor
        self._loop.claim()
        prepared = executor.prepare(call, may_wait=True)
        if isinstance(prepared, CacheMiss):
            executor.check_bytes(prepared)
        elif prepared is not None and not executor.hooked:
            with contextlib.suppress(AnalysisError):
                return executor.value(call, prepared.job, prepared.outcome, prepared.state)
        return self._loop.call(executor.execute, call, prepared)

    def _iterate(self, items: AsyncGenerator[R, None]) -> Generator[R, None, None]:
        """Yield the items of an async generator, one at a time."""

        async def step() -> R:
            return await anext(items)

        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._loop.call(step)
        finally:
            self._loop.end(items)


for _name in (
    "open",
    "ask",
    "stream",
    "chat",
    "stream_chat",
    "analyze",
    "analyze_result",
    "decide",
    "locate",
    "read",
    "map",
    "stats",
):
    getattr(Pipeline, _name).__doc__ = getattr(AsyncPipeline, _name).__doc__

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
