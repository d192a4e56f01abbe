"""The execution of a call: from the cache, by joining a flight, or by the backend, whose answer is cached."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import anyio
import anyio.to_thread

from qvl.backends.base import FILES, Backend, Capabilities
from qvl.caches import key
from qvl.caches.policy import UNCACHED, CacheMode, CachePolicy
from qvl.chunks import unfold
from qvl.errors import AnalysisError
from qvl.log import logger
from qvl.media.digest_cache import DigestCache
from qvl.media.video_parts import fewer_frames, sent_as_pictures
from qvl.pipeline.cache_store import WORKERS, Store, from_entry, to_entry
from qvl.pipeline.job import CacheHit, CacheMiss, Job, Outcome, Streaming
from qvl.pipeline.load_pictures import decode_pictures, is_one_local, load_pictures, naming, read_pictures
from qvl.pipeline.single_flight import CLOSE_SECONDS, Flight, FlightBoard, Written, within
from qvl.plugins.host import PluginHost
from qvl.types import CacheState, ChatRequest, Chunk, JsonObject, Result, Timing, Usage

if TYPE_CHECKING:
    from qvl.calibration.calibrator import Calibrator
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.call import Call

R = TypeVar("R")
Admission: TypeAlias = Callable[[Job], AbstractAsyncContextManager[None]]
_NO_TIMING: Final = Timing()
log = logger("qvl.pipeline")


def _admit_all(job: Job) -> AbstractAsyncContextManager[None]:
    return nullcontext()


class Executor:
    """Executes calls with a backend, a cache and a media policy.

    `admit` is a context around the work of every flight and `on_chunk` gets every chunk; the server uses them for
    admission control and metrics. `notice` is printed once the model is loaded.
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
        notice: str = "",
    ) -> None:
        self.backend = backend
        self.store = store
        self.plugins = plugins
        self.media = media
        self.namespace = namespace
        self.cache_mode: CacheMode = cache_mode
        self.admit: Admission = _admit_all
        self.on_chunk: Callable[[Job, Chunk], None] | None = None
        self.calibrator: Calibrator | None = None
        self.digests = DigestCache()
        self._notice = notice
        self._board = FlightBoard()
        self._workers: anyio.CapacityLimiter | None = None
        self._opening: asyncio.Lock | None = None
        self._opened = False
        # When the model was loaded, so that those who only waited for it are not charged.
        self._loading = (0.0, 0.0)

    async def open(self) -> float:
        """Load weights and connect; return the seconds it took: 0 if already open or opened by another caller."""
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
            if self._notice:
                print(self._notice, file=sys.stderr)
                self._notice = ""
            if self.calibrator is not None:
                self.calibrator.check()
            self._loading = (began, time.perf_counter())
            return self._loading[1] - began

    def identity(self) -> JsonObject | None:
        """Return what of the backend changes its answers; None as long as that is not known."""
        return self.backend.identity() if self._opened else self.backend.peek_identity()

    async def aclose(self) -> None:
        """Cancel running work and close backend and cache; see `AsyncPipeline.aclose`."""
        try:
            await within(CLOSE_SECONDS, self.backend.aclose())
        finally:
            self._opened = False
            self.digests.clear()
            await self._board.aclose()
            if self.store is not None:
                await self.store.aclose()

    def stats(self) -> dict[str, float]:
        """Return the counters of backend (`backend_…`) and cache (`cache_…`), and `num_flights`."""
        counters = {f"backend_{name}": float(value) for name, value in self.backend.stats().items()}
        counters["num_flights"] = float(len(self._board))
        if self.store is not None:
            counters["cache_failures"] = float(self.store.failures)
        return counters

    @property
    def hooked(self) -> bool:
        """True if a plugin has a `response_done` hook, which must be called on the event loop."""
        return bool(self.plugins.hook.response_done.get_hookimpls())

    def prepare(self, call: Call[R], *, may_wait: bool) -> CacheHit | CacheMiss | None:
        """Load and hash the pictures in this thread, and return the cache hit or miss of `call`.

        Return None if loading must wait for the network, for several pictures (better read in parallel) or for opening
        the backend; and, unless `may_wait`, for a disk, a large picture or the cache. Loaded pictures stay in the
        call, so that the next attempt continues from there.

        Raises:
            RequestError: the request is invalid, or the backend does not support it.
        """
        job = call.job
        if job is None:
            job = call.job = self._job(call, may_wait=may_wait)
        if job is None:
            return None
        if self.store is None or job.key is None or not job.policy.read:
            return CacheMiss(job)
        began = time.perf_counter()
        if may_wait:
            entry = self.store.get(job.key, max_age=job.policy.max_age)
        else:
            known, entry = self.store.peek(job.key, max_age=job.policy.max_age)
            if not known:
                return None
        outcome = None if entry is None else from_entry(entry)
        job.stages.cache += time.perf_counter() - began
        return CacheMiss(job) if outcome is None else CacheHit(job, outcome)

    def _job(self, call: Call[R], *, may_wait: bool) -> Job | None:
        """Return the request of `call` with its cache key; None if that would have to wait, as in `prepare`."""
        if call.loaded is None:
            media = call.policy or self.media
            call.loaded = read_pictures(call.pictures, media, self.digests, may_wait=may_wait)
        if call.loaded is None:
            return None
        have = None
        if call.needs_capabilities and (have := self._known_capabilities()) is None:
            return None
        request = call.request(call.loaded, have)
        policy = call.cache
        if not isinstance(policy, CachePolicy):
            mode = self.cache_mode if policy is None else policy
            policy = CachePolicy.of(mode, deterministic=call.task == "analyze" or request.sampling.deterministic)
        if self.store is None:
            policy = UNCACHED
        namespace = self.namespace if call.namespace is None else call.namespace
        manifest: key.Manifest | None = None
        if policy.used:
            identity = self.identity()
            if identity is not None and request.adapter:
                identity = {**identity, "adapter": self.backend.adapters().get(request.adapter, request.adapter)}
            if identity is None or not (may_wait or all(picture.hashed for picture in request.pictures)):
                return None
            if request.videos and have is None and (have := self._known_capabilities()) is None:
                call.needs_capabilities = True
                return None
            manifest = key.build_manifest(
                request,
                identity=identity,
                max_pixels=self.media.max_pixels,
                task=call.task,
                prompt_version=call.prompt_version,
                language=call.language,
                namespace=namespace,
                video_form="" if have is None else have.form_of(request),
            )
        job_key = None if manifest is None else key.hash_manifest(manifest)
        call.stages.media = max(0.0, call.stages.media + time.perf_counter() - call.started)
        return Job(
            request=request,
            policy=policy,
            manifest=manifest,
            key=job_key,
            started=call.started,
            stages=call.stages,
            task=call.task,
            language=call.language,
            namespace=namespace,
        )

    def _known_capabilities(self) -> Capabilities | None:
        """Return the backend's capabilities; None while it must be opened to know them, or the name of its model."""
        if self._opened:
            return self.backend.capabilities
        return None if self.backend.peek_identity() is None else self.backend.peek_capabilities()

    async def _prepared(self, call: Call[R]) -> CacheHit | CacheMiss:
        """Return the cache hit or miss of `call`, waiting as needed."""
        prepared = self.prepare(call, may_wait=False)
        while prepared is None:
            await self._make_ready(call)
            if self._workers is None:
                self._workers = anyio.CapacityLimiter(WORKERS)
            work = partial(self.prepare, call, may_wait=True)
            prepared = await anyio.to_thread.run_sync(work, limiter=self._workers)
        return prepared

    async def _make_ready(self, call: Call[R]) -> None:
        """Fetch or read the pictures of `call` in parallel, and open the backend if the call needs its capabilities."""
        backend = self.backend
        needed = self._known_capabilities() if call.needs_capabilities else backend.peek_identity()
        known = self._opened or needed is not None
        if call.loaded is None and not (known and is_one_local(call.pictures)):
            call.loaded = await load_pictures(call.pictures, call.policy or self.media, digests=self.digests)
        if not known:
            began = time.perf_counter()
            call.stages.loading = await self.open()
            # Reading ends when the job is made, and opening is not part of it.
            call.stages.media -= time.perf_counter() - began

    def check_bytes(self, miss: CacheMiss) -> None:
        """Verify in this thread that pictures whose bytes the backend forwards unchanged can be decoded.

        Raises:
            MediaError: a picture is cut short or broken.
        """
        pictures = miss.job.request.pictures
        if self.backend.wants_pixels or not all(picture.untouched for picture in pictures):
            return
        began = time.perf_counter()
        for number, picture in enumerate(pictures):
            with naming(number):
                picture.checked()
        miss.job.stages.decoding += time.perf_counter() - began

    async def execute(self, call: Call[R], prepared: CacheHit | CacheMiss | None = None) -> R:
        """Return the value that `call` is for; `prepared` is the result of `prepare`, None if it was not called.

        Raises:
            RequestError: the request is invalid, or the backend does not support it.
            BackendError: the model could not answer.
            AnalysisError: neither the cached nor a new answer fits the schema.
        """
        if prepared is None:
            prepared = await self._prepared(call)
        job = prepared.job
        if isinstance(prepared, CacheHit):
            outcome, state = prepared.outcome, prepared.state
        else:
            outcome, state = await self._work(call, job)
        try:
            return self.value(call, job, outcome, state)
        except AnalysisError:
            # Kept for a class of the same shape with other validators: a new answer may fit.
            job = dataclasses.replace(job, policy=dataclasses.replace(job.policy, read=False))
            outcome, state = await self._work(call, job)
            return self.value(call, job, outcome, state)

    async def _work(self, call: Call[R], job: Job) -> tuple[Outcome, CacheState]:
        """Return the outcome of a cache miss, from a new flight or from a running one that it joins."""
        work = partial(self._answer, call, job)
        if job.flight is None:
            return await self._board.alone(work), "bypass"
        flight, joined = self._board.join(job.flight, work)
        outcome = await flight.outcome()
        return outcome, _state(job, outcome, joined)

    async def stream(self, call: Call[R]) -> AsyncGenerator[Chunk | Result, None]:
        """Yield the answer chunk by chunk, and the whole Result as the last item."""
        streaming = await self.start(call)
        async with aclosing(streaming.items) as items:
            async for item in items:
                yield item

    async def start(self, call: Call[R]) -> Streaming:
        """Start the stream of `call` and return it; its origin (cache state) is known before the first chunk."""
        prepared = await self._prepared(call)
        job = prepared.job
        if isinstance(prepared, CacheHit):
            outcome = prepared.outcome
            return Streaming(prepared.state, self._replay(job, outcome), outcome.result.created_at)
        flight, joined = self._board.join(job.flight, partial(self._answer, call, job))
        origin: CacheState = "coalesced" if joined else "miss" if job.key is not None else "bypass"
        return Streaming(origin, self._follow(job, flight, joined))

    async def _replay(self, job: Job, outcome: Outcome) -> AsyncGenerator[Chunk | Result, None]:
        for chunk in unfold(outcome.result):
            yield chunk
        yield self._finish(job, outcome, "hit")

    async def _follow(self, job: Job, flight: Flight, joined: bool) -> AsyncGenerator[Chunk | Result, None]:
        async with aclosing(flight.chunks()) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield item
                else:
                    yield self._finish(job, item, _state(job, item, joined))

    def value(self, call: Call[R], job: Job, outcome: Outcome, state: CacheState) -> R:
        """Return what the user of `call` gets for `outcome`.

        Raises:
            AnalysisError: `outcome` does not fit the schema; another answer may.
        """
        return call.value(outcome, partial(self._finish, job, outcome, state))

    def _finish(self, job: Job, outcome: Outcome, state: CacheState) -> Result:
        """Return the Result with this caller's own request id, cache state and timing; run hooks and log it."""
        now = time.perf_counter()
        total = now - job.started - job.waited_in(self._loading, now)
        answer, request, stages = outcome.result, job.request, job.stages
        timing = answer.timing if state in ("miss", "bypass") else _NO_TIMING
        result = Result(
            choices=answer.choices,
            usage=answer.usage,
            timing=Timing(
                media=stages.media + stages.decoding,
                decoding=stages.decoding,
                cache=stages.cache,
                loading=stages.loading,
                queue=timing.queue + stages.queue,
                first_token=timing.first_token,
                total=total,
            ),
            cache=state,
            request_id=request.request_id,
            model=answer.model,
            backend=answer.backend,
            created_at=answer.created_at,
            key=job.key,
            # Not of the answer that is kept: another request may have these very frames from a file of another name.
            notes=self._notes_on(request) + answer.notes if request.videos else answer.notes,
            pictures=request.pictures,
            prompt=answer.prompt,
            videos=request.videos,
        )
        for hook in self.plugins.hook.response_done.get_hookimpls():
            try:
                hook.function(*[{"request": request, "result": result}[name] for name in hook.argnames])
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

    def _notes_on(self, request: ChatRequest) -> tuple[str, ...]:
        """Return what the result says of the request's videos."""
        have = self._known_capabilities()
        why = None if have is None else have.why_pictures(request)
        me = f"{self.backend.name}:{self.backend.model}"
        return fewer_frames(request.videos) + (sent_as_pictures(request.videos, f"{me} {why}") if why else ())

    async def _answer(self, call: Call[R], job: Job, emit: Written) -> Outcome:
        """Return the outcome of `call`, computed by another process or by the backend, and then cached."""
        store, lease = self.store, None
        if store is not None and job.key is not None:
            lease, entry = await store.lease_or_entry(job.key, read=job.policy.read, max_age=job.policy.max_age)
            if entry is not None and (outcome := from_entry(entry)) is not None:
                for chunk in unfold(outcome.result):
                    emit(chunk)
                return dataclasses.replace(outcome, origin="cache")
        try:
            async with self.admit(job):
                ready = await self._decoded(job)
                outcome = await call.run(self._generate, ready, emit)
            if store is not None and job.key is not None and job.policy.write and self._is_kept(job, outcome):
                began = time.perf_counter()
                await store.set(job.key, to_entry(ready, outcome), lease=lease)
                job.stages.cache += time.perf_counter() - began
            return outcome
        finally:
            if lease is not None and store is not None:
                with anyio.CancelScope(shield=True):
                    await store.release(lease)

    def _is_kept(self, job: Job, outcome: Outcome) -> bool:
        """True if an answer is whole, and videos went as its key says: another endpoint may have come meanwhile."""
        form = "" if job.manifest is None else job.manifest.get("video_form", "")
        return outcome.result.complete and form == self.backend.capabilities.form_of(job.request)

    async def _decoded(self, job: Job) -> Job:
        """Return the job with its pictures decoded as the backend needs them; the time counts as decoding."""
        if not job.request.pictures:
            return job
        as_files = False
        if job.request.videos:
            if (have := self._known_capabilities()) is None:
                # An endpoint that takes files is sent nothing that was decoded.
                job.stages.loading += await self.open()
                have = self.backend.capabilities
            as_files = have.form_of(job.request) == FILES
        began = time.perf_counter()
        request = await decode_pictures(job.request, pixels=self.backend.wants_pixels, videos=not as_files)
        job.stages.decoding += time.perf_counter() - began
        return job if request is job.request else dataclasses.replace(job, request=request)

    async def _generate(self, job: Job, emit: Written) -> Outcome:
        """Stream the backend's chunks into `emit`, and return the complete outcome."""
        if not self._opened:
            job.stages.loading += await self.open()
        began, before = time.perf_counter(), len(emit)

        def on_chunk(chunk: Chunk) -> None:
            emit(chunk)
            if self.on_chunk is not None:
                self.on_chunk(job, chunk)

        salt, videos = job.salt, job.request.videos
        request = self.backend.capabilities.taken(job.request)
        if salt != request.cache_salt:
            request = request.with_salt(salt)
        folder = await self.backend.fold(request, on_chunk=on_chunk, take_back=partial(emit.take_back, before))
        timing = folder.timing
        if not timing.total:
            timing = dataclasses.replace(timing, total=time.perf_counter() - began)
        return Outcome(
            Result(
                choices=folder.choices(),
                usage=_with_frames(folder.usage, sum([len(video.frames) for video in videos])),
                timing=timing,
                notes=folder.notes,
                model=request.adapter or self.backend.model,
                backend=self.backend.name,
                created_at=time.time(),
                prompt=folder.prompt,
            )
        )


def _with_frames(usage: Usage, frames: int) -> Usage:
    return usage if usage.video_frames == frames else dataclasses.replace(usage, video_frames=frames)


def _state(job: Job, outcome: Outcome, joined: bool) -> CacheState:
    if joined:
        return "coalesced"
    if outcome.origin == "cache":
        return "hit"
    return "miss" if job.key is not None else "bypass"
