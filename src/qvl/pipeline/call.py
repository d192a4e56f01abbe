"""Calls: each describes a verb of a user, from its pictures to the value that it returns.

A call describes and waits for nothing; `Executor` executes it, on the event loop or, as far as that gets, in the
thread of a blocking caller.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeAlias, TypeVar

from qvl.pipeline.job import Job, Outcome, Stages
from qvl.pipeline.parse_message import MessageLike
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.pipeline.parse_request import RequestParams, draft_request
from qvl.pipeline.single_flight import Written

if TYPE_CHECKING:
    from qvl.backends.base import Capabilities
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy
    from qvl.types import ChatRequest, Result

R = TypeVar("R")
Generate: TypeAlias = Callable[[Job, Written], Awaitable[Outcome]]
"""Asks the backend once, streaming into what is written."""


class Call(ABC, Generic[R]):
    """One question, to be executed once; everything but its pictures is read and checked when it is made.

    `task`, `language` and `prompt_version` go into the key of its answer.

    Args:
        cache: how the cache is used; None for the pipeline's own way.
        policy: of the media gate; None for the pipeline's.
        started: since when its time counts, by time.perf_counter().
    """

    task: ClassVar[str] = "chat"
    needs_capabilities: ClassVar[bool] = False
    language = ""
    prompt_version = ""
    pictures: Sequence[UnreadPicture] = ()

    def __init__(
        self,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
        started: float | None = None,
    ) -> None:
        self.started = time.perf_counter() if started is None else started
        # What the executor knows of it so far, so that nothing is read twice.
        self.loaded: Sequence[Picture] | None = None
        self.job: Job | None = None
        self.stages = Stages()
        self.cache = cache
        self.namespace = namespace
        self.policy = policy

    @abstractmethod
    def request(self, pictures: Sequence[Picture], have: Capabilities | None) -> ChatRequest:
        """Return the request over the loaded `pictures`; `have` is not None where the call `needs_capabilities`.

        Raises:
            RequestError: what cannot be asked.
        """

    async def run(self, generate: Generate, job: Job, emit: Written) -> Outcome:
        """Return the outcome of asking the backend, once or more often."""
        return await generate(job, emit)

    @abstractmethod
    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> R:
        """Return what the user gets; `finish` makes the Result, once the outcome fits.

        Raises:
            AnalysisError: it cannot be made of this outcome, but may be of another.
        """


class RequestCall(Call["Result"]):
    """A ready request, its pictures loaded."""

    def __init__(
        self,
        request: ChatRequest,
        cache: CacheMode | CachePolicy | None,
        *,
        namespace: str | None = None,
        started: float | None = None,
    ) -> None:
        super().__init__(cache, namespace=namespace, started=started)
        self._request = request

    def request(self, pictures: Sequence[Picture], have: Capabilities | None) -> ChatRequest:
        return self._request

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> Result:
        return finish()


class ChatCall(RequestCall):
    """A conversation, as messages and parameters of `draft_request`."""

    def __init__(
        self, messages: Sequence[MessageLike], cache: CacheMode | CachePolicy | None, params: RequestParams
    ) -> None:
        started = time.perf_counter()
        self._draft = draft_request(messages, **params)
        super().__init__(self._draft.request, cache, started=started)
        self.pictures = self._draft.pictures

    def request(self, pictures: Sequence[Picture], have: Capabilities | None) -> ChatRequest:
        return self._draft.finished(pictures)
