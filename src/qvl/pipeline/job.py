"""One request on its way through the pipeline, and where its time goes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from qvl.caches.key import Manifest
from qvl.caches.policy import CachePolicy
from qvl.types import CacheState, ChatRequest, Chunk, Result


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
        """Who may share its work: the same question, with the same wishes for the age of its answer."""
        return None if self.key is None else (self.key, self.policy)

    @property
    def salt(self) -> str:
        """What keeps computed prefixes apart as answers are: the namespace's, within it also the request's own."""
        if not self.namespace:
            return self.request.cache_salt
        # Hashed together, so that nobody comes by a salt of another namespace's by choosing it.
        both = json.dumps([self.namespace, self.request.cache_salt])
        return "namespace-" + hashlib.sha256(both.encode()).hexdigest()[:32]

    def waited_in(self, loading: tuple[float, float], now: float) -> float:
        """Seconds until `now` for which it only waited while another loaded the model, from and to `loading`."""
        stages = self.stages
        if stages.loading:
            return 0.0
        ready = self.started + stages.media + stages.decoding + stages.cache + stages.queue
        return max(0.0, min(now, loading[1]) - max(ready, loading[0]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished piece of work leaves: the answer, its analysis if there is one, and where it came from."""

    result: Result
    analysis: Mapping[str, Any] | None = None
    confidence: Mapping[str, Any] = field(default_factory=dict)
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
