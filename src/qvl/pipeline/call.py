"""Calls: each describes one ask, chat or analyze, from its pictures to the value that it returns.

A call does no I/O; `Executor` executes it on the event loop or, as far as possible, in the thread of a blocking
caller.
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
    from qvl.media.policy import MediaPolicy
    from qvl.media.video import Medium
    from qvl.types import ChatRequest, Result

R = TypeVar("R")
Generate: TypeAlias = Callable[[Job, Written], Awaitable[Outcome]]
"""Asks the backend once, streaming into what is written."""


class Call(ABC, Generic[R]):
    """One request to execute once; its constructor validates everything but the pictures.

    `task`, `language` and `prompt_version` are parts of the cache key.

    Args:
        cache: the cache mode or policy; None takes the pipeline's.
        policy: the media policy; None takes the pipeline's.
        started: when the request arrived, by time.perf_counter(), from which its `total` time counts; None is now.
    """

    task: ClassVar[str] = "chat"
    # Of a request with videos too, once they are read.
    needs_capabilities: bool = False
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
        self.loaded: Sequence[Medium] | None = None
        self.job: Job | None = None
        self.stages = Stages()
        self.cache = cache
        self.namespace = namespace
        self.policy = policy

    @abstractmethod
    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        """Return the request with the loaded `pictures`; `have` is None unless the call `needs_capabilities`.

        Raises:
            RequestError: the request is invalid.
        """

    async def run(self, generate: Generate, job: Job, emit: Written) -> Outcome:
        """Return the backend's outcome, after one or more calls of `generate`; chunks are written to `emit`."""
        return await generate(job, emit)

    @abstractmethod
    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> R:
        """Return what the user gets for `outcome`; `finish` is called for the Result once the outcome is valid.

        Raises:
            AnalysisError: `outcome` does not fit the schema; another answer may.
        """


class RequestCall(Call["Result"]):
    """The call of a complete ChatRequest, its pictures already loaded."""

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

    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        return self._request

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> Result:
        return finish()


class ChatCall(RequestCall):
    """The call of a conversation: messages and parameters as in `draft_request`."""

    def __init__(
        self, messages: Sequence[MessageLike], cache: CacheMode | CachePolicy | None, params: RequestParams
    ) -> None:
        started = time.perf_counter()
        self._draft = draft_request(messages, **params)
        super().__init__(self._draft.request, cache, started=started)
        self.pictures = self._draft.pictures

    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        return self._draft.finished(pictures)
