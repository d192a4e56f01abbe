"""Data types shared by pipeline, backends and caches: frozen, slotted dataclasses that validate themselves.

Times are in seconds, tokens are the model's, text is `str`. Names are OpenAI's for messages and usage, vLLM's for
sampling.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

from qvl.errors import ConfigError
from qvl.sampling import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from qvl.media.picture import Picture
    from qvl.media.video import Video

T = TypeVar("T")

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose form is somebody else's: a client's schema, a tool's parameters, an endpoint's extra fields."""
JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, read only."""
MAPPINGS: Final = (dict, Mapping)
"""For isinstance: a dict, which nearly every mapping is, is known at once, and the abstract class is slow to ask."""
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]
CacheState: TypeAlias = Literal["hit", "miss", "coalesced", "bypass"]
ROLES: Final = ("system", "user", "assistant", "tool")
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
PROMPT_FIELDS: Final[tuple[tuple[str, object], ...]] = (
    ("chat_template_kwargs", {}),
    ("add_generation_prompt", True),
    ("continue_final_message", False),
    ("reasoning_effort", None),
    ("prompt", None),
)
"""The fields of a ChatRequest that shape its prompt beside the messages, with their defaults."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture in a message, checked by the media gate."""

    picture: Picture

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (self.picture,)


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A video in a message, checked by the media gate; its frames are chosen."""

    video: Video

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.video.frames


MediaPart: TypeAlias = ImagePart | VideoPart
"""What is shown in a message. Another kind joins the union here, and type checking names all who must learn it."""
Part: TypeAlias = TextPart | MediaPart


def map_parts(parts: Iterable[Part], text: Callable[[TextPart], T], media: Callable[[MediaPart], T]) -> list[T]:
    """Return the results of `text` for each text part and of `media` for each media part, in order."""
    return [text(part) if isinstance(part, TextPart) else media(part) for part in parts]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call by the model: `arguments` is the JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: JsonMapping = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("the name of a tool is empty", param="tools")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; its text and picture parts keep their order.

    `reasoning` is what the model thought before an earlier answer; templates of Thinking models show it again where
    they need it.
    """

    role: Role
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"unknown role {self.role!r}", hint=f"one of {', '.join(ROLES)}", param="messages")

    def with_parts(self, parts: tuple[Part, ...]) -> Message:
        """Return the message with `parts` in the place of its own."""
        return Message(self.role, parts, self.tool_calls, self.tool_call_id, self.name, self.reasoning)

    @property
    def text(self) -> str:
        """Return all text parts, joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Return the message's pictures, in order; those of a video are its frames."""
        shown = [part.pictures for part in self.parts if not isinstance(part, TextPart)]
        return tuple([picture for pictures in shown for picture in pictures])

    @property
    def videos(self) -> tuple[Video, ...]:
        """Return the message's videos, in order."""
        return tuple([part.video for part in self.parts if isinstance(part, VideoPart)])


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The constraint on an answer's format. Exactly the field for its `kind` is set.

    `json_object`: any JSON object. `json_schema`: `schema`. `regex`: `pattern`. `choice`: `choices`. `grammar`:
    `pattern`, a grammar in GBNF (or EBNF), or in Lark's syntax.
    """

    kind: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"] = "text"
    schema: JsonMapping | None = None
    pattern: str | None = None
    choices: tuple[str, ...] = ()
    name: str = "answer"

    def __post_init__(self) -> None:
        if self.kind == "json_schema":
            complete = self.schema is not None
        elif self.kind == "choice":
            complete = bool(self.choices)
        else:
            complete = self.kind not in ("regex", "grammar") or bool(self.pattern)
        if not complete:
            raise ConfigError(f"response_format {self.kind!r} lacks its {self.kind.removeprefix('json_')}")


class _Shown:
    """What a request lists once of its messages, since it is asked for some thirty times.

    Attributes:
        pictures: all pictures of the conversation, in order; those of a video are its frames.
        videos: all videos of the conversation, in order.
        written: for backends, what they wrote of everything but the pictures. Requests that differ in pictures, id and
            `cache_salt` alone may share it.
    """

    __slots__ = ("pictures", "videos", "written")
    pictures: tuple[Picture, ...]
    videos: tuple[Video, ...]
    written: dict[Hashable, Sequence[bytes]]

    # Type checkers would let any name pass.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Called for what is not set: each of them, when it is first asked for.
            if name not in _Shown.__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            if name == "written":
                object.__setattr__(self, "written", {})
                return self.written
            shown = [part for message in self.messages for part in message.parts if not isinstance(part, TextPart)]
            pictures = tuple([picture for part in shown for picture in part.pictures])
            videos = tuple([part.video for part in shown if isinstance(part, VideoPart)])
            object.__setattr__(self, "pictures", pictures)
            object.__setattr__(self, "videos", videos)
            return pictures if name == "pictures" else videos


@dataclass(frozen=True, slots=True)
class ChatRequest(_Shown):
    """A chat request, independent of the backend.

    `tool_choice` is "none", "auto", "required" or the name of a tool. `max_pixels` limits every picture of the request
    (None: the media gate's budget). Requests with different `cache_salt` share no cached answer, prefix or picture
    features, so that timing reveals nothing. `extra` is passed on to backends that declare `extra_body`.

    `chat_template_kwargs` are variables of the model's chat template, `add_generation_prompt` False leaves out the
    opening of the answer's turn, and `continue_final_message` has the answer go on where the last message ends.
    `reasoning_effort` is "none", "minimal", "low", "medium", "high", "xhigh" or "max". `prompt` is text or token ids
    that the answer continues as they stand, in place of the messages. Of waiting requests the one with the least
    `priority` comes first. `prefill` are token ids with which the answer has begun; it goes on behind them. `adapter`
    names one of the backend's LoRA adapters.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    max_pixels: int | None = None
    cache_salt: str = ""
    request_id: str = ""
    extra: JsonMapping = field(default_factory=dict)
    chat_template_kwargs: JsonMapping = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    prompt: str | tuple[int, ...] | None = None
    priority: int = 0
    prefill: tuple[int, ...] = ()
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            what = f"unknown reasoning_effort {self.reasoning_effort!r}"
            raise ConfigError(what, hint=f"one of {', '.join(EFFORTS)}", param="reasoning_effort")
        if not self.messages:
            raise ConfigError("a request needs at least one message", param="messages")
        if self.tools or self.tool_choice not in ("none", "auto"):
            self._check_tools()

    def _check_tools(self) -> None:
        named = {tool.name for tool in self.tools}
        if len(named) != len(self.tools):
            raise ConfigError("two tools have the same name", hint="rename one of them", param="tools")
        if self.tool_choice not in {"none", "auto", "required"} | named:
            raise ConfigError(f"unknown tool in tool_choice: {self.tool_choice!r}", param="tool_choice")
        if self.tool_choice == "required" and not self.tools:
            raise ConfigError("tool_choice is 'required' but there are no tools", param="tool_choice")

    def prompt_fields(self) -> JsonObject:
        """Return those of the fields that shape a prompt and differ from their defaults, as JSON."""
        values = _OF_PROMPT(self)
        # Most requests have none.
        if values == _PROMPT_DEFAULTS:
            return {}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for (name, default), value in zip(PROMPT_FIELDS, values, strict=True)
            if value != default
        }

    @property
    def forced_tools(self) -> tuple[Tool, ...]:
        """Return the tools of which one must be called; empty if the model may answer with text."""
        return tuple([tool for tool in self.tools if self.tool_choice in ("required", tool.name)])

    @property
    def holds_calls(self) -> bool:
        """True if a tool may be called, but need not, and its calls are held to a form: strict, or one alone."""
        may_call = bool(self.tools) and self.tool_choice == "auto" and self.response_format.kind == "text"
        return may_call and (any(tool.strict for tool in self.tools) or not self.parallel_tool_calls)

    def with_messages(
        self,
        messages: tuple[Message, ...],
        request_id: str = "",
        *,
        written: dict[Hashable, Sequence[bytes]] | None = None,
    ) -> ChatRequest:
        """Return the request with `messages` in the place of its own, with `request_id` and `written` if given."""
        values = [messages, *_VALUES(self)[1:]]
        if request_id:
            values[_ID] = request_id
        made = ChatRequest(*values)
        if written is not None:
            object.__setattr__(made, "written", written)
        return made

    def with_salt(self, cache_salt: str) -> ChatRequest:
        """Return the request with another `cache_salt`."""
        made = self.replace(cache_salt=cache_salt)
        object.__setattr__(made, "written", self.written)
        return made

    def replace(self, **changes: Any) -> ChatRequest:
        """Return a copy with `changes`, names of fields and their values."""
        values = dict(zip(_FIELDS, _VALUES(self), strict=True))
        values.update(changes)
        return ChatRequest(**values)


_FIELDS: Final = tuple(field.name for field in dataclasses.fields(ChatRequest))
_VALUES: Final = operator.attrgetter(*_FIELDS)
_ID: Final = _FIELDS.index("request_id")
_OF_PROMPT: Final = operator.attrgetter(*(name for name, _ in PROMPT_FIELDS))
_PROMPT_DEFAULTS: Final = tuple(default for _, default in PROMPT_FIELDS)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token: its text, bytes and log-probability (natural log).

    `top` are the most likely alternatives at its position, best first, without alternatives of their own. Of a prompt's
    token, `id` is its id and `rank` its place among all, 1 being the likeliest; -1 and 0 where nobody asked for them.
    """

    token: str
    logprob: float
    bytes: bytes = b""
    top: tuple[TokenLogprob, ...] = ()
    id: int = -1
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """A prompt as the model read it: its token ids, their text, and their logprobs (None for the first) if wanted."""

    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. All but `completion_tokens` and `reasoning_tokens`, which is part of those, are in `prompt_tokens`.

    `image_tokens` are those of pictures, `video_tokens` of videos, of which `video_frames` frames were shown.
    `reasoning_tokens` are those between the marks of a thought; 0 where an endpoint does not tell them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    video_tokens: int = 0
    video_frames: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def of_prompt(self) -> Usage:
        """The counts of the prompt alone."""
        return dataclasses.replace(self, completion_tokens=0, reasoning_tokens=0)

    @classmethod
    def sum(cls, usages: Iterable[Usage]) -> Usage:
        """Return the counts of several requests together."""
        counts = [dataclasses.astuple(usage) for usage in usages]
        return cls(*(sum(column) for column in zip(*counts, strict=True)))


@dataclass(frozen=True, slots=True)
class Timing:
    """The durations of a request's stages in seconds; 0 for a stage that did not happen or is unknown.

    `media`: reading and decoding pictures; `decoding`: the decoding alone. `cache`: look-up and store. `queue`: waiting
    for the engine. `first_token`: from the backend's start to its first token (queue included). `loading`: loading the
    model, in the request that did it; in others the wait for it is in no stage. `total`: the whole request.
    """

    media: float = 0.0
    cache: float = 0.0
    queue: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    decoding: float = 0.0
    loading: float = 0.0

    @property
    def answering(self) -> float:
        """Seconds of the whole request without loading the model."""
        return self.total - self.loading


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call: `id` and `name` come with the first piece of call `index`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One streamed piece of choice `index`.

    The last chunk of a choice has its `finish_reason`, and the `stop_string` that ended it, if one did; the last chunk
    of the stream has `usage` (and `timing`, where known). If the request wants logprobs, each token appears in exactly
    one chunk; so with `token_ids`. The first chunk has the `prompt`, if the request asks for that, and `prompt_usage`,
    the counts of the prompt alone, if the backend knows them then. Any chunk may have `notes`, which become the
    Result's.
    """

    text: str = ""
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    token_ids: tuple[int, ...] = ()
    prompt: PromptFacts | None = None
    stop_string: str | None = None
    notes: tuple[str, ...] = ()
    prompt_usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` finished answers of a request."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] = ()
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The complete result of a request, folded from its stream.

    `notes` list deviations from the request, such as a schema that was validated afterwards because the endpoint
    ignores schemas. `pictures` are what was shown, the frames of `videos` among them.
    """

    choices: tuple[Choice, ...]
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)
    cache: CacheState = "bypass"
    request_id: str = ""
    model: str = ""
    backend: str = ""
    created_at: float = 0.0
    key: str | None = None
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)
    prompt: PromptFacts | None = None
    videos: tuple[Video, ...] = field(default=(), repr=False, compare=False)

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason if self.choices else "stop"

    @property
    def complete(self) -> bool:
        """True if there is an answer, and no choice was aborted."""
        return bool(self.choices) and all(choice.finish_reason != "abort" for choice in self.choices)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls if self.choices else ()

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning if self.choices else ""

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs if self.choices else None

    def _repr_html_(self) -> str:
        from qvl.html.cards import answer_html

        return answer_html(self.pictures, [choice.text for choice in self.choices], self.facts, self.videos)

    @property
    def facts(self) -> str:
        """Return one line to show: backend and model, state of the cache, seconds without loading the model, tokens."""
        return (
            f"{self.backend}:{self.model} · cache {self.cache} · {self.timing.answering:.2f} s · "
            f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens"
        )


_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return _canonical(value)


def finite_json(value: object) -> object:
    """Return `value` with None for numbers that JSON cannot hold: infinite ones, and what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(inner) for inner in value]
    return value
