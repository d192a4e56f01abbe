"""The `ray` backend: one engine process a device, as replicas under Ray Serve.

Serve starts the replicas, checks their health and replaces those that died; `PictureRouter` chooses among them; a
request whose replica is lost is repeated on another one, and its stream continues where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from qvl.backends.base import CUT_OFF, Backend, Capabilities, began
from qvl.backends.quarantine import Quarantine
from qvl.backends.ray import cluster
from qvl.backends.resume import Continuation, Diverged
from qvl.errors import (
    BackendError,
    BackendTimeoutError,
    BackendUnavailableError,
    ConfigError,
    EngineDeadError,
    QvlError,
)
from qvl.log import logger
from qvl.media.gate import hash_pictures
from qvl.media.video_parts import without_files
from qvl.types import ChatRequest, Chunk, JsonObject

if TYPE_CHECKING:
    from qvl.backends.ray.deployment import Deployment
    from qvl.backends.ray.replica import About

ATTEMPTS: Final = 6
FIRST_PAUSE: Final = 0.2
WATCH_SECONDS: Final = 2.0
log = logger("qvl.backends.ray")


class RayBackend(Backend):
    """Runs `replicas` engines under Ray Serve, each on a device of its own.

    Args:
        model: as in a Pipeline: a folder or hub id, `vllm:NAME`, the name of a plugin's backend; None is the small
            bundled model.
        replicas: engine processes, each with one device.
        devices: "npu", "cuda", "cpu" (a share of the cores each), or "auto": npu, cuda, cpu in this order.
        ray_address: address of a Ray cluster: "auto" for that of this host, or HOST:PORT; None starts one on this
            machine, which ends with this process. Backends of the same settings and cluster share replicas.
        make: makes the backend of each replica, instead of `model`; must be picklable.
        max_ongoing: most concurrent requests of a replica.
        cpus_per_replica: CPU cores of each replica; by default an even share.
        object_store_bytes: shared memory of a cluster started by this backend.
        total_timeout: seconds for one request, repetitions included.
        drain_timeout: seconds for a replica's running requests when it is removed.
        quarantine: refuse a picture for an hour once two replicas died with it; a path keeps such pictures in a file
            for all processes that name it; False tries them on every replica.
        options: options of each replica's backend.

        A deterministic answer (greedy, or with a seed) survives the loss of its replica at any point; requests that
        sample without a seed are given one for that.

        Raises:
            ConfigError: an argument is invalid.
    """

    name = "ray"
    shareable = True
    wants_pixels = False

    def __init__(
        self,
        model: str | None = None,
        *,
        replicas: int = 1,
        devices: str = "auto",
        ray_address: str | None = None,
        make: Callable[[], Backend] | None = None,
        max_ongoing: int = 256,
        cpus_per_replica: float | None = None,
        object_store_bytes: int = cluster.OBJECT_STORE_BYTES,
        total_timeout: float = 600.0,
        drain_timeout: float = 30.0,
        quarantine: bool | str = True,
        **options: object,
    ) -> None:
        cluster.check_settings(replicas, devices, ray_address)
        if make is not None and (model or options):
            raise ConfigError("`make` excludes model and options", hint="leave model and options out", param="make")
        if cpus_per_replica is not None and cpus_per_replica <= 0:
            raise ConfigError(f"cpus_per_replica={cpus_per_replica} must be above 0", param="cpus_per_replica")
        if max_ongoing < 1:
            raise ConfigError(f"max_ongoing={max_ongoing} is out of range", hint="1 or more", param="max_ongoing")
        cluster.require_ray("ray.serve")
        self.model = model or "bundled"
        self._spec = model or None
        self._options = options
        self._make = make
        if make is None:
            from qvl.backends.ray.replica import build

            # Thrown away: it is made to hear now about a name or an option that does not exist.
            build(self._spec, options, None)
        self._replicas = replicas
        self._devices = devices
        self._address = ray_address
        self._max_ongoing = max_ongoing
        self._cpus = cpus_per_replica
        self._object_store_bytes = object_store_bytes
        self._total_timeout = total_timeout
        self._drain_timeout = drain_timeout
        self._opening = asyncio.Lock()
        self._deployment: Deployment | None = None
        self._about: tuple[About, ...] = ()
        self._starting: asyncio.Task[tuple[Deployment, tuple[About, ...]]] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._alive = 0
        self._closed = asyncio.Event()
        self._running = 0
        self._counts = dict.fromkeys(("requests", "moved", "failures"), 0)
        self._quarantine = Quarantine(quarantine if isinstance(quarantine, str) else None, on=bool(quarantine))
        self._headless: str | None = None
        self._lost: str | None = None
        # A cluster of others may start after this process, and so may its hosts.
        self.engines_may_come = ray_address is not None

    @property
    def capabilities(self) -> Capabilities:
        return self._about[0].capabilities if self._about else Capabilities()

    def identity(self) -> JsonObject:
        """Return the identity of the replicas' backend, so that cache keys are the same with and without Ray."""
        return dict(self._about[0].identity) if self._about else super().identity()

    def adapters(self) -> Mapping[str, str]:
        return self._about[0].adapters if self._about else {}

    def replicas(self) -> tuple[About, ...]:
        """Return descriptions of the replicas, made when the backend was opened."""
        return self._about

    def describe(self) -> str:
        """Return one line: number of replicas, their devices, number of hosts."""
        if not self._about:
            return "not open"
        kinds = ", ".join(sorted({about.device or "?" for about in self._about}))
        hosts = len({about.host for about in self._about})
        return f"{len(self._about)} replicas under Ray Serve on {hosts} host{'s' * (hosts > 1)}: {kinds}"

    async def open(self) -> None:
        """Join the cluster, start the replicas, and wait until each has loaded its model.

        Raises:
            ConfigError: fewer free devices than replicas, or an invalid setting of the replicas' backend.
            BackendError: the cluster cannot be joined, or a replica could not be opened.
        """
        async with self._opening:
            if self._deployment is not None:
                return
            if self._closed.is_set():
                raise BackendUnavailableError("this backend was closed", hint="make a new one")
            if self._starting is None or _failed(self._starting):
                # Goes on when whoever waits for it gives up: the next who opens or closes takes over.
                self._starting = asyncio.create_task(asyncio.to_thread(self._deploy))
            try:
                await asyncio.wait((self._starting,))
            finally:
                cluster.take_back_sigterm()
            starting, self._starting = self._starting, None
            deployment, self._about = starting.result()
            self._deployment = deployment
            self.model = self._about[0].model or self.model
            self._alive = len(self._about)
            self._watching = asyncio.create_task(self._watch(deployment))

    def _deploy(self) -> tuple[Deployment, tuple[About, ...]]:
        from qvl.backends.ray.deployment import Deployment
        from qvl.backends.ray.replica import build

        cluster.join(self._address, object_store_bytes=self._object_store_bytes)
        deployment = None
        try:
            deployment = Deployment(
                None if self._make is not None else [self._spec, self._options, self._devices, self._replicas],
                shared=self._address is not None,
            )
            if not deployment.exists():
                share = cluster.room(self._replicas, self._devices, self._cpus)
                deployment.start(
                    self._make or partial(build, self._spec, self._options, share.kind, self._replicas),
                    replicas=self._replicas,
                    actor_options=share.actor_options(),
                    max_ongoing=self._max_ongoing,
                    drain_timeout=self._drain_timeout,
                )
            about = deployment.about(self._replicas)
            if self._closed.is_set():
                raise BackendUnavailableError("the backend was closed while its replicas started")
        except BaseException:
            if deployment is not None:
                deployment.stop()
            cluster.leave()
            raise
        log.info("replicas_ready", replicas=[(a.replica, a.host, a.pid) for a in about], devices=self._devices)
        return deployment, about

    async def aclose(self) -> None:
        self._closed.set()
        async with self._opening:
            # Nothing is forgotten before it has ended: a thread that asked Ray after the process has left would connect
            # it anew, and whoever gives up waiting may close it again.
            if self._starting is not None:
                await asyncio.wait((self._starting,))
                if not _failed(self._starting):
                    self._deployment = self._starting.result()[0]
                self._starting = None
            if self._watching is not None:
                await asyncio.wait((self._watching,))
                self._watching = None
            deployment, self._deployment = self._deployment, None
            # Of a cluster that is gone nothing can be stopped, and Ray would wait for it, or crash.
            if deployment is not None and self._lost is None:
                await asyncio.to_thread(_stop, deployment)

    async def _watch(self, deployment: Deployment) -> None:
        """Poll the cluster's head and the number of running replicas, for `unready()` and the counters."""
        membership = await asyncio.to_thread(cluster.Membership)
        while not await self._closes_within(WATCH_SECONDS):
            problem = await asyncio.to_thread(cluster.head_problem)
            if problem != self._headless:
                self._headless = problem
                (log.info if problem is None else log.error)("ray_head", problem=problem)
            if problem is not None and self._address is not None:
                # Without a head nobody knows, and the question would wait for an answer.
                continue
            # The head of a cluster of our own is started by nobody else.
            self._lost = problem or await asyncio.to_thread(membership.lost)
            if self._lost is not None:
                return
            self._alive = await asyncio.to_thread(deployment.running)

    async def _closes_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
        return self._closed.is_set()

    def unready(self) -> str | None:
        if self._closed.is_set():
            return "closed"
        if self._deployment is None:
            return "not open"
        if self._headless is not None or self._lost is not None:
            return self._headless or self._lost
        return None if self._alive else "no replica is running; Ray is starting another"

    def lost(self) -> str | None:
        return self._lost

    def stats(self) -> Mapping[str, float]:
        return {
            "num_running": self._running,
            "replicas": len(self._about),
            "replicas_running": self._alive,
            "pictures_quarantined": len(self._quarantine),
            "quarantine_refusals_total": self._quarantine.refused,
            **{f"{name}_total": count for name, count in self._counts.items()},
        }

    def release_pictures(self) -> None:
        """Release all pictures from quarantine."""
        self._quarantine.release()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        deployment = self._deployment
        if deployment is None or self._closed.is_set():
            raise BackendUnavailableError(f"ray:{self.model} is not open", hint="await backend.open()")
        self.refuse_unsupported(request)
        self._running += 1
        self._counts["requests"] += 1
        try:
            if request.pictures:
                # Encoding is slow where the bytes are not those of the source, and would hold up every other stream.
                await asyncio.to_thread(lambda: [picture.data for picture in request.pictures])
            sent = without_files(self._repeatable(request))
            async with aclosing(self._answer(deployment, sent)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except QvlError:
            self._counts["failures"] += 1
            raise
        finally:
            self._running -= 1

    def _repeatable(self, request: ChatRequest) -> ChatRequest:
        """Return the request with a seed if it samples, so that another replica gives the same answer."""
        if request.sampling.deterministic or not self.capabilities.seed:
            return request
        return request.replace(sampling=replace(request.sampling, seed=random.getrandbits(62)))

    async def _answer(self, deployment: Deployment, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer, continued by another replica whenever one is lost."""
        await hash_pictures(request.pictures)
        self._quarantine.refuse(request)
        deadline = began() + self._total_timeout
        key = request.pictures[0].sha256 if request.pictures else None
        continuation = Continuation()
        lost: set[str] = set()
        for attempt in range(ATTEMPTS):
            if attempt:
                self._counts["moved"] += 1
                continuation.again()
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), 5.0))
            # Alone among its kind, so that one that kills this replica too is known for certain.
            suspect = self._quarantine.suspects(request)
            turn = self._alone(request, deadline) if suspect else contextlib.nullcontext()
            await turn.__aenter__()
            call = deployment.call(key, frozenset(lost), request)
            try:
                # What came of others with its pictures while it waited for its turn.
                self._quarantine.refuse(request)
                async for bundle in call.bundles(deadline, self._closed):
                    for chunk in bundle:
                        new = continuation.rest(chunk)
                        if new is not None:
                            yield new
                self._quarantine.cleared(request)
                return
            except Diverged:
                raise BackendError(
                    "a replica was lost in the middle of the answer, and another one answers differently",
                    hint="ask again",
                    code=CUT_OFF,
                ) from None
            except (BackendUnavailableError, EngineDeadError) as exc:
                if call.died:
                    self._quarantine.killed(request, str(call.replica), suspect=suspect)
                    self._quarantine.refuse(request)
                if self._closed.is_set() or attempt == ATTEMPTS - 1 or time.monotonic() > deadline:
                    if isinstance(exc, EngineDeadError):
                        # The replica's end, which Ray replaces, and not that of this process.
                        raise BackendUnavailableError(str(exc), hint="Ray is starting another") from exc
                    raise
                log.warning(
                    "replica_lost",
                    replica=call.replica,
                    request_id=request.request_id,
                    begun=continuation.begun,
                    why=str(exc),
                )
                if call.replica is not None:
                    lost.add(call.replica)
            finally:
                call.end()
                await turn.__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def _alone(self, request: ChatRequest, deadline: float) -> AsyncGenerator[None, None]:
        """The only suspect at the replicas, whichever of them it will be, of all processes with this quarantine."""
        while not self._quarantine.begin(request, ""):
            if not await self._quarantine.one_was_tried(deadline, elsewhere=True):
                raise BackendTimeoutError("other pictures that were there when a replica died are tried first")
        try:
            yield
        finally:
            self._quarantine.tried(request, "")


def _failed(task: asyncio.Task[tuple[Deployment, tuple[About, ...]]]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _stop(deployment: Deployment) -> None:
    try:
        deployment.stop()
    finally:
        cluster.leave()
