"""One request on its way through the pipeline, and where its time goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypedDict

from qvl.caches.key import Manifest
from qvl.caches.policy import CachePolicy
from qvl.types import CacheState, ChatRequest, Chunk, JsonMapping, Result


@dataclasses.dataclass(slots=True)
class Stages:
    """Seconds spent so far, by stage; `chunk_at` is `time.perf_counter()` at the latest piece of text."""

    media: float = 0.0
    decoding: float = 0.0
    cache: float = 0.0
    loading: float = 0.0
    queue: float = 0.0
    chunk_at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request on its way: what to ask, under which key, and since when; no manifest and key without a cache."""

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
        """The key of those who may share its work: who ask the same, with the same wishes for the answer's age."""
        return None if self.key is None else (self.key, self.policy)

    @property
    def salt(self) -> str:
        """The salt of computed prefixes, kept apart as answers are: by namespace, within it by the request's own."""
        if not self.namespace:
            return self.request.cache_salt
        # Hashed together, so that nobody comes by a salt of another namespace's by choosing it.
        both = json.dumps([self.namespace, self.request.cache_salt])
        return "namespace-" + hashlib.sha256(both.encode()).hexdigest()[:32]

    def waited_in(self, loading: tuple[float, float], now: float) -> float:
        """Return the seconds until `now` in which it only waited while another loaded the model, in `loading`."""
        stages = self.stages
        if stages.loading:
            return 0.0
        ready = self.started + stages.media + stages.decoding + stages.cache + stages.queue
        return max(0.0, min(now, loading[1]) - max(ready, loading[0]))


class Confidence(TypedDict, total=False):
    """The confidence of the model in an analysis; empty for any other answer."""

    confidence: float | None
    field_confidence: dict[str, float]
    confidence_method: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a finished piece of work: the answer, its analysis if there is one, and its origin."""

    result: Result
    analysis: JsonMapping | None = None
    confidence: Confidence = field(default_factory=Confidence)
    origin: Literal["backend", "cache"] = "backend"


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A job whose answer is known."""

    job: Job
    outcome: Outcome
    state: ClassVar[CacheState] = "hit"


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """A job whose answer has to be worked for."""

    job: Job


@dataclass(frozen=True, slots=True)
class Streaming:
    """An answer under way: `items` ends with the whole Result and must be closed; `origin` is where it comes from.

    `created_at` is when a cached answer was given, in seconds since the epoch; 0 for one that is new.
    """

    origin: CacheState
    items: AsyncGenerator[Chunk | Result, None]
    created_at: float = 0.0
