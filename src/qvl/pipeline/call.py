"""What a user asked for, from its pictures to what is handed back: the part that the verbs do not share.

A call waits for nothing. Who answers it does: `AsyncPipeline.answer` on the event loop, and for the blocking Pipeline
the caller's own thread, as far as that gets.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qvl.ids import new_request_id
from qvl.pipeline.parse_message import MessageLike
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.pipeline.parse_request import Draft, draft_request

if TYPE_CHECKING:
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.job import Job, Outcome
    from qvl.pipeline.single_flight import Written
    from qvl.types import CacheState, Result

R = TypeVar("R")


class Call(ABC, Generic[R]):
    """One question over one pipeline; everything but its pictures is read and checked when it is made.

    `work` is what a flight does instead of generating once.

    Args:
        policy: of the media gate; the pipeline's unless given.
        started: since when its time counts, by time.perf_counter().
    """

    pictures: Sequence[UnreadPicture] = ()

    def __init__(
        self,
        pipeline: Executor,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
        started: float | None = None,
    ) -> None:
        self.started = time.perf_counter() if started is None else started
        self.pipeline = pipeline
        self.cache = cache
        self.namespace = namespace
        self.policy = policy or pipeline.media
        self.work: Callable[[Job, Written], Any] | None = None

    @abstractmethod
    def job(self, pictures: Sequence[Picture]) -> Job | None:
        """The request with its key, or None while only an open backend could tell what belongs into them.

        Raises:
            RequestError: what cannot be asked.
        """

    @abstractmethod
    def answered(self, job: Job, outcome: Outcome, state: CacheState) -> R:
        """What the user gets.

        Raises:
            AnalysisError: it cannot be made of this outcome, but may be of another.
        """


class ChatCall(Call["Result"]):
    """A conversation, as messages and parameters of `draft_request`."""

    def __init__(
        self,
        pipeline: Executor,
        messages: Sequence[MessageLike],
        cache: CacheMode | CachePolicy | None,
        params: Mapping[str, Any],
    ) -> None:
        super().__init__(pipeline, cache)
        self.draft: Draft = draft_request(messages, **{"request_id": new_request_id(), **params})
        self.pictures = self.draft.pictures

    def job(self, pictures: Sequence[Picture]) -> Job | None:
        return self.pipeline.job_now(self.draft.finished(pictures), self.cache, started=self.started)

    def answered(self, job: Job, outcome: Outcome, state: CacheState) -> Result:
        return self.pipeline.finish(job, outcome, state)
