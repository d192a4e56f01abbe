"""How one request is answered: from the cache, from a flight under way, or by the backend; and then remembered."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import anyio

from qvl.backends.base import Backend
from qvl.caches import key
from qvl.caches.base import CacheEntry
from qvl.caches.policy import CacheMode, CachePolicy
from qvl.chunks import unfold
from qvl.errors import AnalysisError
from qvl.log import logger
from qvl.media.digest_cache import DigestCache
from qvl.pipeline.cache_store import Store, from_entry, to_entry
from qvl.pipeline.job import Job, Outcome, Stages, Streaming
from qvl.pipeline.load_pictures import check_pictures_here, load_pictures, ready_pictures
from qvl.pipeline.single_flight import CLOSE_SECONDS, Flight, FlightBoard, Written, within
from qvl.plugins.host import PluginHost
from qvl.types import CacheState, ChatRequest, Chunk, Result, Timing

if TYPE_CHECKING:
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.call import Call

R = TypeVar("R")
_HIT: Final[CacheState] = "hit"
log = logger("qvl.pipeline")


class Executor:
    """Backend, cache and media policy at work on ready requests; `AsyncPipeline` adds what a user calls.

    `admit` is entered around the work of every flight, and `on_chunk` sees every piece; the server limits and counts
    with them.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store | None,
        plugins: PluginHost,
        media: MediaPolicy,
        *,
        namespace: str,
        cache_mode: CacheMode,
    ) -> None:
        self.backend = backend
        self.store = store
        self.plugins = plugins
        self.media = media
        self.namespace = namespace
        self.cache_mode: CacheMode = cache_mode
        self.admit: Callable[[Job], AbstractAsyncContextManager[Any]] = lambda job: nullcontext()
        self.on_chunk: Callable[[Job, Chunk], None] | None = None
        self.seen = DigestCache()
        self._board = FlightBoard()
        self._opening: asyncio.Lock | None = None
        self._opened = False
        # When the model was loaded, so that those who only waited for it are not charged.
        self._loading = (0.0, 0.0)

    async def open(self) -> None:
        """Loads weights and connects, if that has not happened yet.

        Raises:
            ConfigError: no such model, or an option that cannot work here.
            BackendError: the endpoint or device cannot be used.
        """
        await self._load()

    async def _load(self) -> float:
        """Seconds that this call spent on loading: 0 where it had happened, and where another call did it."""
        if self._opened:
            return 0.0
        if self._opening is None:
            self._opening = asyncio.Lock()
        async with self._opening:
            if self._opened:
                return 0.0
            began = time.perf_counter()
            await self.backend.open()
            self._opened = True
            self._loading = (began, time.perf_counter())
            return self._loading[1] - began

    async def aclose(self) -> None:
        """Ends what is under way and closes the backend, and the cache unless it was given as an instance.

        A backend that does not end is left behind after half a minute.
        """
        try:
            await within(CLOSE_SECONDS, self.backend.aclose())
        finally:
            self._opened = False
            self.seen.clear()
            await self._board.aclose()
            if self.store is not None:
                await self.store.aclose()

    async def start(self, job: Job) -> Streaming:
        """Begins to answer `job`: what `stream_run` does, for those who must know the origin before the first piece."""
        hit = await self.look_up(job)
        if hit is not None:
            return Streaming("hit", self._replay(job, hit), hit.result.created_at)
        flight, joined = self._board.join(job.flight, self._answering(job))
        origin: CacheState = "coalesced" if joined else "miss" if job.key is not None else "bypass"
        return Streaming(origin, self._follow(job, flight, joined))

    async def _replay(self, job: Job, hit: Outcome) -> AsyncGenerator[Chunk | Result, None]:
        for chunk in unfold(hit.result):
            yield chunk
        yield self.finish(job, hit, "hit")

    async def _follow(self, job: Job, flight: Flight, joined: bool) -> AsyncGenerator[Chunk | Result, None]:
        async with aclosing(flight.chunks()) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield item
                else:
                    yield self.finish(job, item, _state(job, item, joined))

    async def job(
        self,
        request: ChatRequest,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        started: float | None = None,
    ) -> Job:
        """A request with its key. Opens the backend unless it can tell its identity without."""
        return await self._made(lambda: self.job_now(request, cache, namespace=namespace, started=started))

    async def _made(self, make: Callable[[], Job | None]) -> Job:
        """The job, at once or with the backend open; what that takes is not part of the media stage."""
        job = make()
        if job is None:
            began = time.perf_counter()
            loading = await self._load()
            waited = time.perf_counter() - began
            job = cast("Job", make())
            job.stages.loading = loading
            job.stages.media = max(0.0, job.stages.media - waited)
        return job

    def job_of(self, call: Call[Any], pictures: Sequence[Picture]) -> Job | None:
        """The request of `call` with its key, or None while only an open backend could tell what belongs into them.

        Raises:
            RequestError: what cannot be asked.
        """
        have = None
        if call.needs_capabilities:
            have = self.backend.peek_capabilities()
            if have is None:
                if not self._opened:
                    return None
                have = self.backend.capabilities
        return self.job_now(
            call.request(pictures, have),
            call.cache,
            namespace=call.namespace,
            started=call.started,
            task=call.task,
            language=call.language,
            prompt_version=call.prompt_version,
        )

    def job_now(
        self,
        request: ChatRequest,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        started: float | None = None,
        task: str = "chat",
        language: str = "",
        prompt_version: str = "",
    ) -> Job | None:
        """As `job`, but None where the backend has to be opened first. `task` and the rest go into the key."""
        now = time.perf_counter()
        policy = (
            cache
            if isinstance(cache, CachePolicy)
            else CachePolicy.of(
                self.cache_mode if cache is None else cache,
                deterministic=task == "analyze" or request.sampling.deterministic,
            )
        )
        if self.store is None:
            policy = CachePolicy(read=False, write=False)
        if self._opened:
            identity: Mapping[str, Any] | None = self.backend.identity()
        else:
            identity = self.backend.peek_identity() if policy.used else None
        if identity is None:
            return None
        space = self.namespace if namespace is None else namespace
        manifest = key.build_manifest(
            request,
            identity=identity,
            max_pixels=self.media.max_pixels,
            task=task,
            prompt_version=prompt_version,
            language=language,
            namespace=space,
        )
        return Job(
            request=request,
            policy=policy,
            manifest=manifest,
            key=key.hash_manifest(manifest) if policy.used else None,
            started=started if started is not None else now,
            stages=Stages(media=now - started if started is not None else 0.0),
            task=task,
            language=language,
            namespace=space,
        )

    @property
    def opened(self) -> bool:
        """Whether the backend is open."""
        return self._opened

    @property
    def hooked(self) -> bool:
        """Whether a plugin wants to hear of finished answers, which it does on the event loop."""
        return bool(self.plugins.hook.response_done.get_hookimpls())

    async def look_up(self, job: Job) -> Outcome | None:
        """The cached outcome of `job`, if its policy allows and there is one."""
        if self.store is None or job.key is None or not job.policy.read:
            return None
        began = time.perf_counter()
        return _found(job, await self.store.get(job.key, max_age=job.policy.max_age), began)

    def look_up_here(self, job: Job) -> Outcome | None:
        """As `look_up`, in this thread, which waits for the store."""
        if self.store is None or job.key is None or not job.policy.read:
            return None
        began = time.perf_counter()
        return _found(job, self.store.get_here(job.key, max_age=job.policy.max_age), began)

    async def execute(self, job: Job, work: Callable[[Job, Written], Any] | None = None) -> tuple[Outcome, CacheState]:
        """The outcome of `job` from the cache, from a flight under way, or from the backend."""
        hit = await self.look_up(job)
        return await self.flown(job, work) if hit is None else (hit, _HIT)

    async def flown(self, job: Job, work: Callable[[Job, Written], Any] | None = None) -> tuple[Outcome, CacheState]:
        """As `execute`, for a job that was looked up in vain."""
        flight, joined = self._board.join(job.flight, self._answering(job, work))
        outcome = await flight.outcome()
        return outcome, _state(job, outcome, joined)

    async def answer(self, call: Call[R], pictures: Sequence[Picture] | None = None) -> R:
        """Everything from the pictures on, which may be loaded already."""
        if pictures is None:
            pictures = await load_pictures(call.pictures, call.policy or self.media, seen=self.seen)
        read = pictures
        job = await self._made(lambda: self.job_of(call, read))
        return await self.conclude(call, job, await self.look_up(job))

    async def conclude(self, call: Call[R], job: Job, hit: Outcome | None) -> R:
        """What is left of `answer` after the look-up."""
        work = partial(call.run, self.generate)
        outcome, state = await self.flown(job, work) if hit is None else (hit, _HIT)
        try:
            return self.value(call, job, outcome, state)
        except AnalysisError:
            # Kept for a class of the same shape with other validators: a new answer may fit.
            job = dataclasses.replace(job, policy=dataclasses.replace(job.policy, read=False))
            outcome, state = await self.flown(job, work)
            return self.value(call, job, outcome, state)

    def value(self, call: Call[R], job: Job, outcome: Outcome, state: CacheState) -> R:
        """What the user of `call` gets.

        Raises:
            AnalysisError: it cannot be made of this outcome, but may be of another.
        """
        return call.value(outcome, partial(self.finish, job, outcome, state))

    def finish(self, job: Job, outcome: Outcome, state: CacheState) -> Result:
        """The Result as this caller sees it: its own request id, cache state and timing."""
        now = time.perf_counter()
        total = now - job.started - job.waited_in(self._loading, now)
        timing = outcome.result.timing if state in ("miss", "bypass") else Timing()
        result = dataclasses.replace(
            outcome.result,
            timing=dataclasses.replace(
                timing,
                media=job.stages.media + job.stages.decoding,
                decoding=job.stages.decoding,
                cache=job.stages.cache,
                loading=job.stages.loading,
                queue=timing.queue + job.stages.queue,
                total=total,
            ),
            cache=state,
            request_id=job.request.request_id,
            key=job.key,
            pictures=job.request.pictures,
        )
        for hook in self.plugins.hook.response_done.get_hookimpls():
            try:
                hook.function(*[{"request": job.request, "result": result}[name] for name in hook.argnames])
            except Exception as exc:  # noqa: BLE001 - an outsider's hook must not cost the user the answer
                log.warning("plugin failed after the response", plugin=hook.plugin_name, error=str(exc))
        log.info(
            "request done",
            request_id=result.request_id,
            task=job.task,
            cache=state,
            seconds=round(total, 4),
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
        )
        return result

    def _answering(self, job: Job, work: Callable[[Job, Written], Any] | None = None) -> Callable[[Written], Any]:
        async def answer(emit: Written) -> Outcome:
            lease = None
            if self.store is not None and job.key is not None:
                lease, entry = await self.store.lease_or_entry(
                    job.key, read=job.policy.read, max_age=job.policy.max_age
                )
                if entry is not None and (found := from_entry(entry)) is not None:
                    for chunk in unfold(found.result):
                        emit(chunk)
                    return dataclasses.replace(found, origin="cache")
            try:
                async with self.admit(job):
                    ready = await self.with_pictures(job)
                    outcome = cast("Outcome", await (work or self.generate)(ready, emit))
                if self.store is not None and job.key is not None and job.policy.write and outcome.result.complete:
                    began = time.perf_counter()
                    await self.store.set(job.key, to_entry(ready, outcome), lease=lease)
                    job.stages.cache += time.perf_counter() - began
                return outcome
            finally:
                if lease is not None and self.store is not None:
                    with anyio.CancelScope(shield=True):
                        await self.store.release(lease)

        return answer

    def with_bytes_checked(self, job: Job) -> Job:
        """The job with pictures checked in this thread whose bytes the backend will hand on as they are."""
        pictures = job.request.pictures
        if self.backend.wants_pixels or not pictures or not all(picture.untouched for picture in pictures):
            return job
        began = time.perf_counter()
        request = check_pictures_here(job.request)
        job.stages.decoding += time.perf_counter() - began
        return dataclasses.replace(job, request=request)

    async def with_pictures(self, job: Job) -> Job:
        """The job with its pictures as the backend wants them; the time goes to the media stage."""
        if not job.request.pictures:
            return job
        began = time.perf_counter()
        request = await ready_pictures(job.request, pixels=self.backend.wants_pixels)
        job.stages.decoding += time.perf_counter() - began
        return dataclasses.replace(job, request=request)

    async def generate(self, job: Job, emit: Written) -> Outcome:
        """Streams the backend's answer into `emit` and folds it."""
        job.stages.loading += await self._load()
        began, before = time.perf_counter(), len(emit)

        def on_chunk(chunk: Chunk) -> None:
            emit(chunk)
            if self.on_chunk is not None:
                self.on_chunk(job, chunk)

        request = job.request.replace(cache_salt=job.salt)
        folder = await self.backend.fold(request, on_chunk=on_chunk, take_back=lambda: emit.take_back(before))
        timing = folder.timing
        if not timing.total:
            timing = dataclasses.replace(timing, total=time.perf_counter() - began)
        return Outcome(
            Result(
                choices=folder.choices(),
                usage=folder.usage,
                timing=timing,
                model=self.backend.model,
                backend=self.backend.name,
                created_at=time.time(),
            )
        )


def _state(job: Job, outcome: Outcome, joined: bool) -> CacheState:
    if joined:
        return "coalesced"
    if outcome.origin == "cache":
        return "hit"
    return "miss" if job.key is not None else "bypass"


def _found(job: Job, entry: CacheEntry | None, began: float) -> Outcome | None:
    found = None if entry is None else from_entry(entry)
    job.stages.cache += time.perf_counter() - began
    return found
