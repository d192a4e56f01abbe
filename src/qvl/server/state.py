"""The state that the handlers of one server share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar, cast

from pydantic import BaseModel

from qvl._version import __version__
from qvl.errors import ConfigError, MediaError, QvlError, RequestError
from qvl.server.auth import KeyRing
from qvl.server.errors import DrainingError, HttpError
from qvl.server.known_body import MOST_KEPT, known_body_of
from qvl.server.limits import Admission, KeyLimits
from qvl.server.metrics import BackendStats, Metrics
from qvl.server.pool_admin import EndpointStats, Source, release_pictures, reload_endpoints
from qvl.server.readiness import Readiness
from qvl.server.response_store import ResponseStore
from qvl.types import canonical_json

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.job import Job
    from qvl.server.batches.store import BatchStore
    from qvl.server.known_body import KnownBody
    from qvl.server.limits import SharedSlots
    from qvl.server.settings import ServerSettings
    from qvl.server.shared_limits import SharedLimits
    from qvl.server.tracing import Tracing
    from qvl.server.worker_metrics import WorkerMetrics
    from qvl.types import Chunk, Result

BodyT = TypeVar("BodyT", bound=BaseModel)


def end_now(limit: asyncio.Timeout) -> None:
    """Let the timeout `limit` expire now; no effect if its context has ended."""
    with contextlib.suppress(RuntimeError):
        limit.reschedule(0)


class ServerCore:
    """Pipeline, limits, keys, counters and state of one server. Sets the executor's `admit` and `on_chunk`."""

    def __init__(self, pipeline: AsyncPipeline, settings: ServerSettings) -> None:
        if taken := set(settings.served_model_names) & pipeline.backend.adapters().keys():
            what = f"{min(taken)!r} is the name of the model and of an adapter"
            raise ConfigError(what, hint="give each a name of its own", param="adapter")
        self.pipeline = pipeline
        self.executor = pipeline.executor
        self.settings = settings
        self.keys = KeyRing(settings.api_keys, settings.api_key_file)
        self.metrics = Metrics()
        self.admission = Admission(
            settings.max_concurrent,
            settings.max_queue,
            settings.max_queue_picture_tokens,
            max_job_bytes=settings.max_decoded_bytes,
            max_bytes=settings.max_held_bytes,
            wants_pixels=pipeline.backend.wants_pixels,
        )
        self.key_limits = KeyLimits(settings.requests_per_minute, settings.concurrent_per_key)
        self.readiness = Readiness(pipeline, canary=settings.canary, stall_timeout=settings.stall_timeout)
        self.responses = ResponseStore(pipeline.executor.store, ttl=settings.response_ttl)
        self.tracing: Tracing | None = None
        self.draining = False
        self.held_bytes = 0
        self.under_way: set[asyncio.Timeout] = set()
        self.requests_under_way = 0
        self._idle = asyncio.Event()
        self.batch_store: BatchStore | None = None
        self.batch_endpoints: frozenset[str] = frozenset()
        self.wake_batches: Callable[[], None] = lambda: None
        self.created = int(time.time())
        self._fingerprints: dict[str, str] = {}
        self._known_bodies = lru_cache(MOST_KEPT)(known_body_of)
        self.endpoint_source: Source | None = None
        self._reloads: set[asyncio.Task[None]] = set()
        # Of one of several workers: the metrics of all.
        self.worker_metrics: WorkerMetrics | None = None
        self.shared_limits: SharedLimits | None = None
        self.admission.on_wait = self.metrics.queue.observe
        self.admission.on_refusal = lambda reason: self.metrics.rejections.inc(1, reason)
        self.key_limits.on_refusal = self.admission.on_refusal
        self.metrics.registry.register(BackendStats(self.pipeline.stats))
        self.metrics.registry.register(EndpointStats(self.pipeline.backend))
        self.metrics.running.set_function(self.running)
        self.metrics.waiting.set_function(self.waiting)
        self.metrics.ready.set_function(lambda: float(self.unready() is None))
        self.executor.admit = self.admission.enter
        self.executor.on_chunk = self._on_chunk

    @property
    def names(self) -> tuple[str, ...]:
        """The model names that requests may use: those of the model, then those of its adapters."""
        backend = self.pipeline.backend
        own = self.settings.served_model_names or (backend.model or backend.name,)
        return (*own, *backend.adapters())

    def adapter_of(self, name: str) -> str:
        """Return the adapter of the model `name`, "" if that is the model itself."""
        return name if name in self.pipeline.backend.adapters() else ""

    @property
    def max_images(self) -> int:
        """The most pictures of a request. Valid once the model is loaded."""
        most, limit = self.pipeline.backend.capabilities.images, self.settings.max_images
        return most if limit is None else min(most, limit)

    def refuse_many_images(self, pictures: Iterable[object]) -> None:
        """Raise RequestError if `pictures` are more than a request may have by the server's own limit."""
        limit = self.settings.max_images
        if limit is not None and (count := len([*pictures])) > limit:
            what = f"{count} pictures in one request, where this server allows at most {limit}"
            raise RequestError(what, hint="send fewer, or raise qvl-serve --limit-mm-per-prompt", param="messages")

    @property
    def version(self) -> str:
        return __version__

    def served(self, name: str | None) -> str:
        """Return the model name for the answer to a request that names `name`.

        Raises:
            HttpError: 404, the model does not exist.
        """
        names = self.names
        if name is None:
            return names[0]
        if name not in names and not self.settings.any_model_name:
            raise HttpError(
                404,
                f"the model {name[:200]!r} does not exist",
                hint=f"available: {', '.join(names)}; the server accepts more with --served-model-name NAME, "
                "and every name with --any-model-name",
                param="model",
                code="model_not_found",
            )
        return name

    def fingerprint(self, name: str) -> str:
        """Return OpenAI's `system_fingerprint` of the model `name`: a hash of what affects its answers."""
        adapter = self.adapter_of(name)
        if adapter not in self._fingerprints:
            own = {"adapter": self.pipeline.backend.adapters()[adapter]} if adapter else {}
            identity = canonical_json({"qvl": __version__, **self.pipeline.backend.identity(), **own})
            self._fingerprints[adapter] = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        return self._fingerprints[adapter]

    def namespace(self, tenant: str) -> str:
        """Return the cache namespace of `tenant`, a name from `KeyRing.tenant`; "" shares the pipeline's own."""
        base = self.executor.namespace
        return f"{base}/key-{tenant}" if tenant else base

    def known_body(self, tenant: str, schema: type[BodyT], body: bytes) -> KnownBody[BodyT]:
        """Return what `known_body_of` does, or did for the same if that is still kept."""
        return cast("KnownBody[BodyT]", self._known_bodies(tenant, schema, body))

    def start(self) -> None:
        """Start loading, unless it was started."""
        self.readiness.start(lambda: self.admission.running)

    def share_limits(self, shared: SharedLimits, slots: SharedSlots | None) -> None:
        """Count the limits of API keys in Redis, and with `slots` those of the backend too."""
        self.shared_limits = self.key_limits.shared = shared
        self.admission.shared = slots

    async def scrape(self) -> bytes:
        """Return the metrics in Prometheus' text format, of all workers where there are several."""
        return self.metrics.render() if self.worker_metrics is None else await self.worker_metrics.render()

    def refuse_if_closed(self) -> None:
        """Raise if the server is draining or loading, or its engine is dead."""
        if self.draining:
            raise DrainingError("the server is shutting down", hint="send the request to another server")
        self.start()
        closed = self.readiness.closed()
        if closed is not None:
            raise closed

    def reload(self) -> None:
        """Read the key file and the list of endpoints again, and release pictures from quarantine.

        Must be called on the server's event loop.
        """
        self.keys.reload()
        release_pictures(self.pipeline.backend)
        if self.endpoint_source is not None:
            task = asyncio.ensure_future(reload_endpoints(self.pipeline.backend, self.endpoint_source))
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

    def unready(self) -> str | None:
        """Return why the server is not ready, or None."""
        return "draining: the server is shutting down" if self.draining else self.readiness.reason()

    def running(self) -> float:
        return float(self.pipeline.backend.stats().get("num_running", self.admission.running))

    def waiting(self) -> float:
        return float(self.pipeline.backend.stats().get("num_waiting", 0) + self.admission.waiting)

    def _on_chunk(self, job: Job, chunk: Chunk) -> None:
        self.readiness.note_progress()
        self.metrics.on_chunk(job, chunk)

    def note_error(self, error: QvlError) -> None:
        """Count an error that ended a request."""
        self.readiness.note_error(error)
        if isinstance(error, MediaError):
            # A remote endpoint's own word could be any, and each would be a series for good.
            code = error.code if error.code in error.codes else error.default_code
            self.metrics.media_errors.inc(1, code)

    def note_result(self, result: Result) -> None:
        """Count a finished answer."""
        if result.cache in ("miss", "bypass"):
            self.readiness.note_success()
        self.metrics.on_result(result)

    def leave(self) -> None:
        """Decrement the number of running requests."""
        self.requests_under_way -= 1
        if not self.requests_under_way:
            self._idle.set()

    async def drain(self) -> bool:
        """Refuse new requests and wait for running ones; abort the rest at the end. Return True if none was aborted."""
        self.draining = True
        end = time.monotonic() + self.settings.drain_timeout
        while self.requests_under_way and (remaining := end - time.monotonic()) > 0:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), remaining)
        clean = not self.requests_under_way
        for limit in list(self.under_way):
            end_now(limit)
        return clean

    async def aclose(self) -> None:
        for task in self._reloads:
            task.cancel()
        await self.readiness.stop()
        await self.pipeline.aclose()
        if self.shared_limits is not None:
            await self.shared_limits.aclose()
        if self.worker_metrics is not None:
            await self.worker_metrics.stop()
