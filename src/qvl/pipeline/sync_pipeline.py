"""`Pipeline`: the signatures of `AsyncPipeline` without `await`, for scripts, notebooks and threads.

One event loop in a daemon thread does the work, so it can be used where a loop is running already (notebooks). A
picture is read, hashed and looked up by the thread that asks, so a known answer needs no other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import anyio
from anyio.from_thread import BlockingPortal

from qvl.backends.base import Backend
from qvl.caches.base import Cache
from qvl.errors import AnalysisError, ConfigError
from qvl.log import logger
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.call import Call, ChatCall
from qvl.pipeline.map_in_order import MapItem
from qvl.pipeline.parse_request import load_picture_here, question_messages
from qvl.pipeline.single_flight import CLOSE_SECONDS
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import AnalysisResult, ProductAnalysis, SchemaLike
    from qvl.media.gate import MediaPolicy
    from qvl.pipeline.cache_store import CacheMode
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import PictureLike

T = TypeVar("T")
R = TypeVar("R")
_END = object()
# The backend, the work under way, and the cache, each of which has its own bound.
CLOSING = 3 * CLOSE_SECONDS
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
        self._loop = _Loop(self.pipeline)
        # Also when it is dropped without close(), and at the interpreter's end: weights must not outlive it.
        weakref.finalize(self, self._loop.close)

    def open(self) -> None:
        self._call(self.pipeline.open)

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
        return self._answer(ChatCall(self.pipeline, messages, cache, params))

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
        return self._answer(self.pipeline.analyze_call(pictures, schema, language, cache, params))

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
        engine: Literal["ray"] | None = None,
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

    def _answer(self, call: Call[R]) -> R:
        """Goes as far as this thread can: to a hit, or to a request that is ready for the backend.

        What waits for nothing but a disk takes less time here than the way to the loop and its threads.
        """
        pipeline = self.pipeline
        self._loop.claim()
        pictures = load_picture_here(call.pictures, call.policy, pipeline.seen)
        job = None if pictures is None else call.job(pictures)
        if job is None:
            return self._loop.call(lambda: pipeline.answer(call, pictures))
        hit = pipeline.look_up_here(job)
        if hit is None:
            job = pipeline.with_bytes_checked(job)
        elif not pipeline.hooked:
            with contextlib.suppress(AnalysisError):
                return call.answered(job, hit, "hit")
        return self._loop.call(lambda: pipeline.conclude(call, job, hit))

    def _call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        return self._loop.call(partial(function, *args, **kwargs))

    def _iterate(self, items: AsyncGenerator[R, None]) -> Generator[R, None, None]:
        """The items of an async generator, one at a time."""

        async def step() -> Any:
            return await anext(items, _END)

        try:
            while (item := self._loop.call(step)) is not _END:
                yield item
        finally:
            self._loop.end(items)


class _Loop:
    """The event loop of one Pipeline, in a thread that starts with the first call."""

    def __init__(self, pipeline: AsyncPipeline) -> None:
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        self._claimed = self._forked = False
        _loops.add(self)

    def call(self, function: Callable[[], Awaitable[R]]) -> R:
        """Runs `function` on the loop and waits for it. Ctrl-C while waiting ends the work too."""
        future = self._running().start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self, items: AsyncGenerator[Any, None]) -> None:
        """Closes an async generator that was begun here, if that was not done yet."""
        portal = self._portal
        if portal is None:
            return
        # It may be ending already, because the wait for its next item was interrupted or the loop is being closed.
        with contextlib.suppress(RuntimeError):
            portal.call(items.aclose)

    def close(self) -> None:
        with self._lock:
            portal, thread = self._portal, self._thread
            self._portal = self._thread = None
        if portal is None or thread is None:
            if self._pipeline.store is not None:
                self._pipeline.store.close()
        elif thread is threading.current_thread():
            # The garbage collector runs anywhere, and this thread cannot wait for itself.
            threading.Thread(target=self._stop, args=(portal, thread), name="qvl-close").start()
        else:
            self._stop(portal, thread)

    def _stop(self, portal: BlockingPortal, thread: threading.Thread) -> None:
        try:
            portal.start_task_soon(self._pipeline.aclose).result(timeout=CLOSING)
        except FutureTimeoutError:
            log.warning("the pipeline did not close in time and is left behind", seconds=CLOSING)
        finally:
            # Not waited for: a loop that something keeps from turning would never answer.
            portal.start_task_soon(portal.stop)
            thread.join(timeout=10)

    def claim(self) -> None:
        """Makes the pipeline this process's own.

        Raises:
            ConfigError: it was its parent's, whose threads stayed there, perhaps with a lock in hand.
        """
        if self._forked:
            raise ConfigError("this pipeline was in use before the fork", hint="make one in each process")
        self._claimed = True

    def _running(self) -> BlockingPortal:
        with self._lock:
            self.claim()
            if self._portal is None:
                ready: Future[BlockingPortal] = Future()
                # A daemon, because a program that forgets close() must still end; the finalizer closes it in order.
                self._thread = threading.Thread(target=_serve_portal, args=(ready,), name="qvl-loop", daemon=True)
                self._thread.start()
                self._portal = ready.result(timeout=30)
            return self._portal

    def _after_fork(self) -> None:
        # The thread stayed in the parent; whoever called it would wait for ever.
        self._lock = threading.Lock()
        self._forked = self._forked or self._claimed
        self._portal = self._thread = None


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


def _forget_threads() -> None:
    for loop in list(_loops):
        loop._after_fork()


_loops: weakref.WeakSet[_Loop] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
