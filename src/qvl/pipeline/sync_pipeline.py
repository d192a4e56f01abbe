"""`Pipeline`: the signatures of `AsyncPipeline` without `await`, for scripts, notebooks and threads.

One event loop in a daemon thread does the work, so it can be used where a loop is running already (notebooks). A
picture is read, hashed and looked up by the thread that asks, so a known answer needs no other.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.errors import AnalysisError
from qvl.log import logger
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.call import Call, ChatCall
from qvl.pipeline.job import CacheMiss
from qvl.pipeline.map_in_order import MapItem
from qvl.pipeline.parse_request import question_messages
from qvl.pipeline.portal import _forget_threads, _Loop
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.analysis.product import AnalysisResult, ProductAnalysis
    from qvl.caches.policy import CacheMode
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import PictureLike

T = TypeVar("T")
R = TypeVar("R")
_END = object()
log = logger("qvl.pipeline")


class Pipeline:
    __doc__ = (AsyncPipeline.__doc__ or "").replace(
        "Asks a model", "Asks a model (blocking; see AsyncPipeline for async code)", 1
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
        plugins: Iterable[Any] = (),
        **options: Any,
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
        """Ends what is under way, closes backend and cache, and stops the loop. Calling it twice is harmless."""
        self._loop.close()

    def ask(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Result:
        return self.chat(question_messages(pictures, question, system), cache=cache, **params)

    def stream(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream(pictures, question, system=system, cache=cache, **params))

    def chat(self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any) -> Result:
        return self._execute(ChatCall(messages, cache, params))

    def stream_chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream_chat(messages, cache=cache, **params))

    @overload
    def analyze(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        *,
        schema: None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> ProductAnalysis: ...
    @overload
    def analyze(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        *,
        schema: type[T],
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> T: ...
    @overload
    def analyze(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        *,
        schema: Mapping[str, Any],
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Any: ...
    def analyze(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        *,
        schema: SchemaLike | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Any:
        return self.analyze_result(pictures, schema=schema, language=language, cache=cache, **params).value

    def analyze_result(
        self,
        pictures: PictureLike | Sequence[PictureLike],
        *,
        schema: SchemaLike | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> AnalysisResult[Any]:
        return self._execute(self.pipeline.analyze_call(pictures, schema, language, cache, params))

    def map(
        self,
        sources: Iterable[PictureLike | Sequence[PictureLike]],
        question: str | None = None,
        *,
        schema: SchemaLike | None = None,
        language: str | None = None,
        concurrency: int | None = None,
        progress: bool = False,
        keep_pictures: bool = False,
        cache: CacheMode | None = None,
        engine: str | None = None,
        replicas: int | None = None,
        ray_address: str | None = None,
        **params: Any,
    ) -> Generator[MapItem, None, None]:
        return self._iterate(
            self.pipeline.map(
                sources,
                question,
                schema=schema,
                language=language,
                concurrency=concurrency,
                progress=progress,
                keep_pictures=keep_pictures,
                cache=cache,
                engine=engine,
                replicas=replicas,
                ray_address=ray_address,
                **params,
            )
        )

    def stats(self) -> Mapping[str, float]:
        return self.pipeline.stats()

    def __enter__(self) -> Pipeline:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _execute(self, call: Call[R]) -> R:
        """Return the value of `call`: a known one from this thread, which also makes a miss ready for the backend.

        What waits for nothing but a disk takes less time here than the way to the loop and its threads.
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
        """The items of an async generator, one at a time."""

        async def step() -> Any:
            return await anext(items, _END)

        try:
            while (item := self._loop.call(step)) is not _END:
                yield item
        finally:
            self._loop.end(items)


for _name in ("open", "ask", "stream", "chat", "stream_chat", "analyze", "analyze_result", "map", "stats"):
    getattr(Pipeline, _name).__doc__ = getattr(AsyncPipeline, _name).__doc__

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
