"""One request in the pipeline: its job, its time per stage, and its outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypedDict

from qvl.caches.key import Manifest
from qvl.caches.policy import CachePolicy
from qvl.types import CacheState, ChatRequest, Chunk, JsonMapping, JsonObject, Result


@dataclasses.dataclass(slots=True)
class Stages:
    """Seconds spent so far, by stage; `chunk_at` is `time.perf_counter()` at the latest chunk."""

    media: float = 0.0
    decoding: float = 0.0
    cache: float = 0.0
    loading: float = 0.0
    queue: float = 0.0
    chunk_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request; `started` is by time.perf_counter(). Manifest and key (of the cache) are None without a cache."""

    request: ChatRequest
    policy: CachePolicy
    manifest: Manifest | None
    key: str | None
    started: float
    stages: Stages
    task: str = "chat"
    language: str = ""
    namespace: str = ""

    @property
    def flight(self) -> tuple[str, CachePolicy] | None:
        """The key under which equal requests share one flight: the cache key and policy; None without a cache."""
        return None if self.key is None else (self.key, self.policy)

    @property
    def salt(self) -> str:
        """The salt of the prefix cache: the namespace and the request's own `cache_salt`."""
        if not self.namespace:
            return self.request.cache_salt
        # Hashed together, so that nobody comes by a salt of another namespace's by choosing it.
        both = json.dumps([self.namespace, self.request.cache_salt])
        return "namespace-" + hashlib.sha256(both.encode()).hexdigest()[:32]

    def waited_in(self, loading: tuple[float, float], now: float) -> float:
        """Return the seconds up to `now` that the job waited while another one loaded the model during `loading`."""
        stages = self.stages
        if stages.loading or loading[1] <= self.started:
            return 0.0
        ready = self.started + stages.media + stages.decoding + stages.cache + stages.queue
        return max(0.0, min(now, loading[1]) - max(ready, loading[0]))


class Confidence(TypedDict, total=False):
    """The model's confidence in an analysis; empty for any other answer."""

    confidence: float | None
    field_confidence: dict[str, float]
    confidence_method: str | None
    evidence: dict[str, JsonObject | None]
    pages: dict[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a finished flight: the answer, its analysis if there is one, and its origin."""

    result: Result
    analysis: JsonMapping | None = None
    confidence: Confidence = field(default_factory=Confidence)
    origin: Literal["backend", "cache"] = "backend"


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A job whose answer is in the cache."""

    job: Job
    outcome: Outcome
    state: ClassVar[CacheState] = "hit"


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """A job whose answer must be generated."""

    job: Job


@dataclass(frozen=True, slots=True)
class Streaming:
    """A streamed answer: `items` ends with the whole Result and must be closed; `origin` is its cache state.

    `created_at` is the time of a cached answer in seconds since the epoch; 0 for a new one.
    """

    origin: CacheState
    items: AsyncGenerator[Chunk | Result, None]
    created_at: float = 0.0
