"""What travels between pipeline, backend and cache: frozen, slotted, self-validating values.

Times are seconds, token counts are the model's own, text is `str`. Names are the field's: OpenAI's for messages and
usage, vLLM's for sampling.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.media.picture import Picture

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose form is somebody else's: a client's schema, a tool's parameters, an endpoint's extra fields."""
JsonMapping: TypeAlias = Mapping[str, Any]
"""The same, read only."""
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]
CacheState: TypeAlias = Literal["hit", "miss", "coalesced", "bypass"]
ROLES: Final = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture at its place in a message, already through the media gate."""

    picture: Picture


Part: TypeAlias = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made: `arguments` is the JSON text as the model wrote it."""

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
            raise ConfigError("a tool needs a name", param="tools")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Parts keep their order, so text and pictures stand where the user put them."""

    role: Role
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"unknown role {self.role!r}", hint=f"one of {', '.join(ROLES)}", param="messages")

    @property
    def text(self) -> str:
        """All text parts, joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part.picture for part in self.parts if isinstance(part, ImagePart))


# One type for each, since 0 and 0.0 are one question, but two texts of JSON and so two keys.
_REALS: Final = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
MAX_STOP_CHARACTERS: Final = 1024
MAX_STOP_IDS: Final = 1024
_WHOLES: Final = ("top_k", "max_tokens", "seed", "logprobs", "n")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; vLLM's names and meanings.

    `temperature` 0 is greedy. `max_tokens` None means "what the context leaves, at most the backend's default".
    `logprobs` is the number of alternatives wanted beside each chosen token (0 = the chosen alone), None for none.
    `top_k` 0 or -1 means all.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name in (*_REALS, *_WHOLES):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(operator.index(value)) if name in _WHOLES else float(value + 0.0))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check("temperature", 0.0 <= self.temperature <= 100.0, "from 0 (greedy) to 100")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        self._check("top_k", self.top_k >= 0, "0 (all) or more")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "1 or more")
        self._check("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0; 1 is neutral")
        self._check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2")
        self._check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2")
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20")
        self._check("n", 1 <= self.n <= 128, "from 1 to 128")
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        fits = len(self.stop) <= 16 and all(0 < len(word) <= MAX_STOP_CHARACTERS for word in self.stop)
        self._check("stop", fits, f"at most 16 strings of 1 to {MAX_STOP_CHARACTERS} characters")
        self._check("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} of them")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            shown = repr(getattr(self, name))
            shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
            raise ConfigError(f"{name}={shown} is out of range", hint=allowed, param=name)

    @classmethod
    def names(cls) -> frozenset[str]:
        return frozenset(f.name for f in dataclasses.fields(cls))

    @property
    def deterministic(self) -> bool:
        """Whether the same request must give the same answer: greedy, or sampled from a seed."""
        return self.temperature == 0.0 or self.seed is not None

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        return {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}


_DEFAULTS: Final = tuple((item.name, item.default) for item in dataclasses.fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What the answer must look like. Exactly the field that `kind` names is set.

    `json_object`: any JSON object. `json_schema`: `schema`. `regex`: `pattern`. `choice`: `choices`.
    """

    kind: Literal["text", "json_object", "json_schema", "regex", "choice"] = "text"
    schema: JsonMapping | None = None
    pattern: str | None = None
    choices: tuple[str, ...] = ()
    name: str = "answer"

    def __post_init__(self) -> None:
        need = {"json_schema": self.schema is not None, "regex": bool(self.pattern), "choice": bool(self.choices)}
        if not need.get(self.kind, True):
            raise ConfigError(f"response_format {self.kind!r} lacks its {self.kind.removeprefix('json_')}")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question to a model, complete and backend-free.

    `tool_choice` is "none", "auto", "required" or the name of a tool. `max_pixels` bounds every picture of the request
    (None: the media gate's own budget). Requests with another `cache_salt` reuse nothing that the engine computed for
    this one, so its speed tells them nothing; it changes no answer. `extra` passes through to backends that declare
    `extra_body`.
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

    def __post_init__(self) -> None:
        if not self.messages:
            raise ConfigError("a request needs at least one message", param="messages")
        named = {tool.name for tool in self.tools}
        if len(named) != len(self.tools):
            raise ConfigError("two tools have the same name", param="tools")
        if self.tool_choice not in {"none", "auto", "required"} | named:
            raise ConfigError(f"tool_choice names no tool: {self.tool_choice!r}", param="tool_choice")
        if self.tool_choice == "required" and not self.tools:
            raise ConfigError("tool_choice is 'required' but there are no tools", param="tool_choice")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in the order in which they stand in the conversation."""
        return tuple([p.picture for message in self.messages for p in message.parts if isinstance(p, ImagePart)])

    @property
    def forced_tools(self) -> tuple[Tool, ...]:
        """The tools of which one must be called; none where the model may answer otherwise."""
        return tuple([tool for tool in self.tools if self.tool_choice in ("required", tool.name)])

    def replace(self, **changes: Any) -> ChatRequest:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token: its text, the bytes it stands for, and log-probability (natural log).

    `top` are the most likely alternatives at that place, best first, without alternatives of their own.
    """

    token: str
    logprob: float
    bytes: bytes = b""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `image_tokens` and `cached_tokens` are parts of `prompt_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds. A stage that did not happen, or is not known, is 0.

    `media`: reading and decoding; `decoding`: that part of it. `cache`: look-up and store. `queue`: for the engine.
    `first_token`: from the backend's start to its first token (queue included). `loading`: loading the model, told by
    the one request that did it; others' waiting for it is in no stage. `total`: everything else, and `loading`.
    """

    media: float = 0.0
    cache: float = 0.0
    queue: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    decoding: float = 0.0
    loading: float = 0.0


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

    The last chunk of a choice has its `finish_reason`; the last chunk of the stream has `usage` (and `timing`, where
    known). With `logprobs` asked for, each token appears in exactly one chunk.
    """

    text: str = ""
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished answer of a request (there are `n`)."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The folded whole of a stream.

    `notes` say what was done differently from what was asked, such as a schema checked after the fact because the
    endpoint ignores schemas.
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

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason if self.choices else "stop"

    @property
    def complete(self) -> bool:
        """Whether there is an answer, and none of its choices was cut off by an abort."""
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

        return answer_html(self.pictures, [choice.text for choice in self.choices], self.facts)

    @property
    def facts(self) -> str:
        """One line for people: backend and model, state of the cache, seconds, tokens."""
        return (
            f"{self.backend}:{self.model} · cache {self.cache} · {self.timing.total:.2f} s · "
            f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens"
        )


_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return _canonical(value)
