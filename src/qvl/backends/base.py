"""The base class of backends; a subclass implements `capabilities` and `stream`.

Modelled on httpx's transports: tests use real subclasses of the same interface.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, final

from qvl.backends.token_table import TokenTable
from qvl.chunks import Folder
from qvl.errors import BackendError, UnsupportedInputError
from qvl.evidence.coordinates import Coordinates, coordinates_of
from qvl.media.video_parts import as_timed_pictures, bytes_with_files
from qvl.types import ChatRequest, Chunk, JsonMapping, JsonObject, Result, SamplingParams, Usage

# The code of an error that ends a stream in the middle of an answer which the same request may well get whole.
CUT_OFF: Final = "stream_cut_off"
# The form of videos that travel as their files.
FILES: Final = "file"
# When the request was asked for first, while it is asked for once more.
_BEGAN: Final[ContextVar[float | None]] = ContextVar("qvl.began", default=None)


def began() -> float:
    """Return the time.monotonic() from which a request's timeouts count: now, or the first attempt's in a retry."""
    return _BEGAN.get() or time.monotonic()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features that a backend supports, probed where that is possible.

    `images` is the most pictures of a request (0: none). `videos` is the most videos that it takes as such; where a
    request has more, it is sent their frames as pictures, each behind its time. `video_form` names how videos are
    written for a backend elsewhere, whose answers to each form are kept apart; `body_bytes` is the most bytes of a
    request in which the files of videos travel. `max_context` is in tokens, None if unknown. `sampling` are the
    SamplingParams fields that have an effect; `response_formats` the kinds that are enforced while generating.
    `extra_body` is True if unknown request fields are passed on; `top_logprobs` is the most alternatives a token.
    `lists` is False if a schema must have an object on top, as OpenAI demands.
    `fields` are those of `PROMPT_FIELDS`, "priority", "prefill" and "cache_salt" that have an effect.
    """

    images: int = 0
    videos: int = 0
    video_form: str = ""
    body_bytes: int | None = None
    max_context: int | None = None
    sampling: frozenset[str] = field(default_factory=SamplingParams.assumed)
    response_formats: frozenset[str] = frozenset()
    tools: bool = False
    extra_body: bool = False
    top_logprobs: int = 20
    fields: frozenset[str] = frozenset()
    lists: bool = True

    @property
    def logprobs(self) -> bool:
        return "logprobs" in self.sampling

    @property
    def json_schema(self) -> bool:
        return "json_schema" in self.response_formats

    @property
    def seed(self) -> bool:
        return "seed" in self.sampling

    def taken(self, request: ChatRequest) -> ChatRequest:
        """Return the request as such a backend gets it: with its videos, or with their frames as timed pictures."""
        return as_timed_pictures(request) if self.why_pictures(request) else request

    def form_of(self, request: ChatRequest) -> str:
        """Return the form in which the request's videos are sent: `pictures`, or the backend's; "" without any."""
        if not request.videos:
            return ""
        return "pictures" if self.why_pictures(request) else self.video_form

    def why_pictures(self, request: ChatRequest) -> str | None:
        """Return why the frames of the request's videos are sent as pictures, as `takes no videos`; None if not."""
        if not request.videos:
            return None
        if len(request.videos) > self.videos:
            most = f"at most {self.videos} video{'s' if self.videos > 1 else ''}" if self.videos else "no videos"
            return f"takes {most}"
        if self.body_bytes is not None and bytes_with_files(request) > self.body_bytes:
            return f"takes at most {self.body_bytes / 2**20:.3g} MiB in a request"
        return None


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as token ids, a picture being as many as it takes, and the text of each token where that was asked."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] | None = None


class OwnDecisions(ABC):
    """A backend's own way of answering questions with a fixed set of answers; `images`: also about pictures."""

    def __init__(self) -> None:
        self.images = False

    @abstractmethod
    async def ask(
        self, request: ChatRequest, questions: Sequence[JsonMapping]
    ) -> tuple[Sequence[Mapping[str | bool, float] | None], Usage]:
        """Return the probability of each value by question (None: declined), and what all of them took.

        Args:
            request: what the questions are about.
            questions: in OpenAI's form, of the types predicate, choice and score.

        Raises:
            QvlError: it cannot, or what it says is not an answer.
        """


class Backend(ABC):
    """Runs one chat request on a model and streams the answer.

    The backend batches: N concurrent `stream()` calls are the batch API. `open()` loads weights and connects;
    `__init__` only checks and stores settings. All methods raise only QvlError.
    """

    name: str = ""
    model: str = ""
    # Whether it asks pictures for their pixels. To one that hands their bytes on they come checked, not decoded.
    wants_pixels: bool = True
    # Whether several processes may each open one: the model itself is elsewhere, and is loaded once.
    shareable: bool = False
    # True if the model is run by others, who may start after a server in front of them: their absence is waited for.
    engines_may_come: bool = False
    # Whether a `</think>` without its `<think>` may end reasoning in its answers: the template is not ours to know.
    splits_thought: bool = False

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Return the supported features. Valid after `open()`."""

    @property
    def coordinates(self) -> Coordinates:
        """Return how the model writes boxes and points; here by its name. Cheap, and valid before `open()`."""
        return coordinates_of(self.model)

    @abstractmethod
    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer to `request` as chunks.

        The last chunk of each choice has its finish_reason, the last of all has Usage. Closing the generator aborts the
        work and frees its resources.

        Raises:
            RequestError: the request is invalid or not supported (before the first chunk).
            BackendError: the model could not answer; possibly after some chunks.
        """

    def refuse_missing(self) -> None:
        """Raise what `open` would raise, as far as it is seen at once: no such folder, a package not installed."""
        return

    async def open(self) -> None:
        """Load weights, open connections, probe. Does nothing if it is open."""
        return

    async def aclose(self) -> None:
        """Close promptly: requests in progress get a BackendError. Does nothing if it is closed."""
        return

    async def tokenize(self, prompt: ChatRequest | str, *, texts: bool = False) -> Tokens:
        """Return the tokens of a request's prompt, or of a plain text; `texts`: with the text of each.

        Raises:
            UnsupportedInputError: the backend does not tell its tokens.
        """
        raise self._tells_no_tokens()

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of the tokens `ids`.

        Raises:
            UnsupportedInputError: the backend does not tell its tokens.
            RequestError: an id is not in the vocabulary.
        """
        raise self._tells_no_tokens()

    async def token_table(self) -> TokenTable | None:
        """Return the model's tokens by their bytes, where the backend knows them: its requests may have a `prefill`."""
        return None

    async def own_decisions(self) -> OwnDecisions | None:
        """Return the backend's own way of deciding; None if it has none. Asked of an open backend, at first use."""
        return None

    def _tells_no_tokens(self) -> UnsupportedInputError:
        hint = "a local model does, and an endpoint with /tokenize"
        return UnsupportedInputError(f"{self.name}:{self.model} does not tell its tokens", hint=hint)

    def identity(self) -> JsonObject:
        """Return every fact of the backend that changes an answer: model, revision, dtype, processor, quantisation.

        Part of the cache key, so values must be JSON and stable between runs. Valid after `open()`.
        """
        return {"backend": self.name, "model": self.model}

    def peek_identity(self) -> JsonObject | None:
        """Return `identity()` before `open()`, so that a cache hit needs no model; None if it is not known yet."""
        return None

    def peek_capabilities(self) -> Capabilities | None:
        """Return `capabilities` before `open()`, as far as cache keys depend on them; None if not known yet."""
        return None

    def adapters(self) -> Mapping[str, str]:
        """Return the LoRA adapters that requests may name, each with what identifies it in their cache keys.

        Valid whenever `identity` or `peek_identity` is; that has the one of all requests, if there is such.
        """
        return {}

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges by snake_case name, such as num_running and num_waiting."""
        return {}

    def unready(self) -> str | None:
        """Return the reason why requests cannot be served now (loading, stalled, dead), or None. Cheap."""
        return None

    def lost(self) -> str | None:
        """Return the reason why this process can never be served again (a new one can), or None. Cheap."""
        return None

    @final
    async def generate(self, request: ChatRequest) -> Result:
        """Return the complete Result of `stream`; see `fold`."""
        started = time.perf_counter()
        folder = await self.fold(request)
        timing = folder.timing
        if not timing.total:
            timing = replace(timing, total=time.perf_counter() - started)
        return Result(
            choices=folder.choices(),
            usage=folder.usage,
            timing=timing,
            request_id=request.request_id,
            model=self.model,
            backend=self.name,
            created_at=time.time(),
            prompt=folder.prompt,
            notes=folder.notes,
        )

    @final
    async def fold(
        self,
        request: ChatRequest,
        *,
        on_chunk: Callable[[Chunk], None] = lambda chunk: None,
        take_back: Callable[[], bool] = lambda: True,
    ) -> Folder:
        """Return a Folder of all chunks of `stream`. An answer whose stream was cut off is requested once more.

        Both attempts share one timeout (see `began`). `on_chunk` is called with every chunk. `take_back` discards the
        chunks of a cut-off answer before the second attempt; if it returns False, since a consumer has read one, the
        error is raised instead.
        """
        start = began()
        try:
            return await self._read(request, on_chunk)
        except BackendError as exc:
            if exc.code != CUT_OFF or not take_back():
                raise
        token = _BEGAN.set(start)
        try:
            return await self._read(request, on_chunk)
        finally:
            _BEGAN.reset(token)

    async def _read(self, request: ChatRequest, on_chunk: Callable[[Chunk], None]) -> Folder:
        folder = Folder(want_logprobs=request.sampling.wants_logprobs, split_thought=self.splits_thought)
        chunks = self.stream(request)
        try:
            async for chunk in chunks:
                folder.add(chunk)
                on_chunk(chunk)
        finally:
            await chunks.aclose()
        return folder

    def refuse_unsupported(self, request: ChatRequest) -> None:
        """Check that the backend's capabilities support `request`.

        Raises:
            UnsupportedInputError: for the first unsupported field, named by `param`.
        """
        have, me = self.capabilities, f"{self.name}:{self.model}"
        pictures, videos, kind = len(request.pictures), request.videos, request.response_format.kind
        if len(videos) > have.videos:
            what = f"takes at most {have.videos} videos to a request" if have.videos else "does not support videos"
            hint = "qvl.media.video_parts.as_timed_pictures(request) has the frames"
            raise UnsupportedInputError(f"{me} {what}", hint=hint, param="messages")
        if videos:
            pictures -= sum(len(video.frames) for video in videos)
        if pictures and not have.images:
            raise UnsupportedInputError(f"{me} does not support pictures", hint="use a vision model", param="messages")
        if pictures > have.images:
            what = f"{pictures} pictures, but {me} takes at most {have.images} to a request"
            hint = "fewer, or of a video fewer frames (nframes)"
            raise UnsupportedInputError(what, hint=hint, param="messages")
        for name in request.sampling.changed():
            if name not in have.sampling:
                raise UnsupportedInputError(f"{me} does not support {name}", hint="leave it out", param=name)
        if (request.sampling.logprobs or 0) > have.top_logprobs:
            raise UnsupportedInputError(f"{me} supports at most {have.top_logprobs} top_logprobs", param="top_logprobs")
        if kind != "text" and kind not in have.response_formats:
            raise UnsupportedInputError(f"{me} does not enforce response_format {kind!r}", param="response_format")
        if request.tools and request.tool_choice != "none" and not have.tools:
            raise UnsupportedInputError(f"{me} does not support tools", param="tools")
        if request.adapter and request.adapter not in self.adapters():
            known = ", ".join(self.adapters()) or "none"
            what = f"{me} has no adapter {request.adapter!r}"
            raise UnsupportedInputError(what, hint=f"it has: {known}", param="adapter")
        fields = [*request.prompt_fields()]
        if request.priority:
            fields.append("priority")
        if request.prefill:
            fields.append("prefill")
        for name in fields:
            if name not in have.fields:
                raise UnsupportedInputError(f"{me} does not support {name}", hint="leave it out", param=name)
        if request.extra and not have.extra_body:
            names = ", ".join(sorted(request.extra))
            raise UnsupportedInputError(f"{me} does not support the fields {names}", param=next(iter(request.extra)))

    async def __aenter__(self) -> Backend:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
