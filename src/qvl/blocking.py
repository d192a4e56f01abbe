"""`Pipeline`: the signatures of `AsyncPipeline` without `await`, for scripts, notebooks and threads.

One event loop in a daemon thread does the work, so it can be used where a loop is running already (notebooks).
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import anyio
from anyio.from_thread import BlockingPortal
from pydantic import BaseModel

from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.mapping import MapItem
from qvl.pipeline import AsyncPipeline
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.analysis import AnalysisResult, ProductAnalysis
    from qvl.media import MediaPolicy, PictureSource
    from qvl.messages import MessageLike
    from qvl.store import CacheMode

T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")
_END = object()
_open: weakref.WeakSet[Pipeline] = weakref.WeakSet()


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
            media=media,
            concurrency=concurrency,
            plugins=plugins,
            **options,
        )
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        _open.add(self)

    def open(self) -> None:
        self._call(self.pipeline.open)

    def close(self) -> None:
        """Ends what is under way, closes backend and cache, and stops the loop. Calling it twice is harmless."""
        with self._lock:
            portal, thread = self._portal, self._thread
            self._portal = self._thread = None
        if portal is None or thread is None:
            if self.pipeline.store is not None:
                self.pipeline.store.cache.close()
            return
        try:
            portal.call(self.pipeline.aclose)
        finally:
            portal.call(portal.stop)
            thread.join(timeout=10)

    def ask(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Result:
        return self._call(self.pipeline.ask, pictures, question, system=system, cache=cache, **params)

    def stream(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        question: str,
        *,
        system: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream(pictures, question, system=system, cache=cache, **params))

    def chat(self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any) -> Result:
        return self._call(self.pipeline.chat, messages, cache=cache, **params)

    def stream_chat(
        self, messages: Sequence[MessageLike], *, cache: CacheMode | None = None, **params: Any
    ) -> Generator[Chunk, None, None]:
        return self._iterate(self.pipeline.stream_chat(messages, cache=cache, **params))

    @overload
    def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> ProductAnalysis: ...
    @overload
    def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[T],
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> T: ...
    def analyze(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> Any:
        return self._call(self.pipeline.analyze, pictures, schema=schema, language=language, cache=cache, **params)

    def analyze_result(
        self,
        pictures: PictureSource | Sequence[PictureSource],
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        cache: CacheMode | None = None,
        **params: Any,
    ) -> AnalysisResult[Any]:
        return self._call(
            self.pipeline.analyze_result, pictures, schema=schema, language=language, cache=cache, **params
        )

    def map(
        self,
        sources: Iterable[PictureSource | Sequence[PictureSource]],
        question: str | None = None,
        *,
        schema: type[Any] | None = None,
        language: str | None = None,
        concurrency: int | None = None,
        progress: bool = False,
        keep_pictures: bool = False,
        cache: CacheMode | None = None,
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

    def _call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        return self._running().call(partial(function, *args, **kwargs))

    def _iterate(self, items: AsyncGenerator[R, None]) -> Generator[R, None, None]:
        """The items of an async generator, one at a time."""

        async def step() -> Any:
            return await anext(items, _END)

        portal = self._running()
        try:
            while (item := portal.call(step)) is not _END:
                yield item
        finally:
            portal.call(items.aclose)

    def _running(self) -> BlockingPortal:
        with self._lock:
            if self._portal is None:
                ready: Future[BlockingPortal] = Future()
                # A daemon, because a program that forgets close() must still end; atexit closes it in order.
                self._thread = threading.Thread(target=_serve_portal, args=(ready,), name="qvl-loop", daemon=True)
                self._thread.start()
                self._portal = ready.result(timeout=30)
            return self._portal


def _serve_portal(ready: Future[BlockingPortal]) -> None:
    async def main() -> None:
        async with BlockingPortal() as portal:
            ready.set_result(portal)
            await portal.sleep_until_stopped()

    try:
        anyio.run(main)
    except BaseException as exc:  # noqa: BLE001 - the waiter must not hang when the loop cannot start
        if not ready.done():
            ready.set_exception(exc)


@atexit.register
def _close_all() -> None:
    for pipeline in list(_open):
        pipeline.close()
