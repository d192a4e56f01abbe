"""The wire format of `/v1/chat/completions`, and the conversion of a ChatRequest to it.

Endpoints deviate from the format, so only the fields that `answer_reader` reads are typed, and a field whose type
varies is an `object`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Required, TypedDict, cast

from qvl.backends.grammar_schema import enforceable
from qvl.backends.openai.wire_videos import VideoForm, part_fields, request_fields, url_pieces
from qvl.errors import RequestError, UnsupportedInputError
from qvl.sampling import PARAMETERS, SamplingParams
from qvl.types import ChatRequest, MediaPart, Message, ResponseFormat, TextPart, VideoPart, map_parts

_RESERVED: Final = frozenset({"model", "messages", "stream", "stream_options"})
# The sampling parameters that every request says.
_ALWAYS: Final = tuple(name for name, known in PARAMETERS.items() if known.sent == "always")
# It stands for a picture until the body is encoded. Nobody can have written this in a text of theirs.
_MARK: Final = os.urandom(16).hex()
_WRITTEN_MARK: Final = f'"{_MARK}"'.encode()
_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class WireFunction(TypedDict, total=False):
    """The function of a tool call; some servers send `arguments` as an object."""

    name: str | None
    arguments: object


class WireToolCall(TypedDict, total=False):
    """A tool call: complete in a request, a piece in an event."""

    index: int | None
    id: str | None
    type: str
    function: WireFunction | None


class WirePart(TypedDict, total=False):
    """A part of a message: text, a picture or a video; in answers also a refusal."""

    type: Required[str]
    text: str | None
    image_url: dict[str, str]
    refusal: str | None
    video_url: dict[str, str]


class WireMessage(TypedDict, total=False):
    """A message of a request or an answer, or the delta of an event."""

    role: str
    content: str | list[WirePart] | None
    reasoning_content: str | None
    reasoning: str | None
    refusal: str | None
    tool_calls: list[WireToolCall] | None
    function_call: WireFunction | None
    tool_call_id: str
    name: str


class WireBody(TypedDict, total=False):
    """The body of a request or a part of it, without sampling parameters and extra fields."""

    model: str
    messages: list[WireMessage]
    stream: bool
    stream_options: dict[str, bool]
    response_format: dict[str, object]
    structured_outputs: dict[str, object]
    tools: list[dict[str, object]]
    tool_choice: str | WireToolCall
    parallel_tool_calls: bool
    cache_salt: str


class WireLogprob(TypedDict, total=False):
    token: Required[str]
    logprob: Required[float]
    bytes: list[int] | None
    top_logprobs: list[WireLogprob] | None


class WirePromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


class WireChoice(TypedDict, total=False):
    """One choice of an event."""

    index: int | None
    delta: WireMessage | None
    message: WireMessage | None
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: dict[str, list[WireLogprob] | None] | None
    token_ids: list[int] | None


class WireUsage(TypedDict, total=False):
    prompt_tokens: int | None
    completion_tokens: int | None
    prompt_tokens_details: dict[str, int | None] | None
    completion_tokens_details: dict[str, int | None] | None
    reasoning_tokens: int | None


class WireEvent(TypedDict, total=False):
    """An event of the stream; an error has `error`, `detail` or `message`, or `object` "error"."""

    object: object
    choices: list[WireChoice] | None
    usage: WireUsage | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[str, WirePromptLogprob] | None] | None
    notes: object
    error: object


class ListedModel(TypedDict):
    """A model in the list of GET /models."""

    id: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """The deviations of one endpoint from OpenAI's format.

    `pinned` are the sampling fields beyond OpenAI's that are sent even at their defaults: vLLM and SGLang otherwise use
    the checkpoint's generation_config, which may add a repetition penalty to a greedy request. `sampled` is False for
    models that reject a temperature. `videos` is the form in which it takes videos; None if it takes pictures alone.
    """

    max_tokens: str = "max_tokens"
    stream_options: bool = True
    sampled: bool = True
    pinned: frozenset[str] = frozenset()
    videos: VideoForm | None = None


def request_body(request: ChatRequest, model: str, dialect: Dialect) -> list[bytes | memoryview]:
    """Return the encoded body of a streamed chat completion, in pieces.

    Pictures and videos are inserted after the JSON encoding, as bytes, which is faster than encoding megabytes of
    base64; pictures that came as base64 are passed on without a copy.

    Raises:
        UnsupportedInputError: `request.extra` has a field that qvl sets.
        RequestError: `request.extra` or a schema has values that are not valid JSON.
    """
    key = (model, dialect, request.cache_salt)
    written = request.written.get(key)
    if written is None:
        written = request.written[key] = encoded(_body(request, model, dialect)).split(_WRITTEN_MARK)
    text, *behind = written
    pieces: list[bytes | memoryview] = [text]
    shown = [part for message in request.messages for part in message.parts if not isinstance(part, TextPart)]
    for part, rest in zip(shown, behind, strict=True):
        if isinstance(part, VideoPart):
            assert dialect.videos is not None
            pieces += (b'"', *url_pieces(part.video, dialect.videos, request.max_pixels), b'"' + rest)
            continue
        fitting = part.picture if request.max_pixels is None else part.picture.fit(request.max_pixels)
        pieces += (f'"data:{fitting.media_type};base64,'.encode(), fitting.base64(), b'"' + rest)
    return pieces


def _body(request: ChatRequest, model: str, dialect: Dialect) -> dict[str, object]:
    """Return the body before encoding, with `_MARK` in place of every picture."""
    fields: WireBody = {
        "model": model,
        "messages": [_message(message, dialect, request.max_pixels) for message in request.messages],
        "stream": True,
    }
    if dialect.stream_options:
        fields["stream_options"] = {"include_usage": True}
    if request.cache_salt and dialect.pinned:
        # An endpoint that knows vLLM's fields has a prefix cache to keep apart; others refuse what they do not know.
        fields["cache_salt"] = request.cache_salt
    for name in request.extra:
        if name in _RESERVED:
            raise UnsupportedInputError(f"{name!r} cannot be an extra field", hint="qvl itself sets it", param=name)
    form, tools = format_fields(request.response_format), _tools(request)
    prompt = request.prompt_fields()
    if request.priority:
        prompt["priority"] = request.priority
    media = request_fields(request.videos, dialect.videos, request.extra)
    return {**fields, **_sampling(request.sampling, dialect), **form, **tools, **prompt, **request.extra, **media}


def _sampling(params: SamplingParams, dialect: Dialect) -> dict[str, object]:
    """Return the fields of the body for `params`."""
    fields: dict[str, object] = {}
    if dialect.sampled:
        for name in _ALWAYS:
            fields[name] = getattr(params, name)
    changed = params.changed()
    for name in dialect.pinned:
        if name not in changed:
            known = PARAMETERS[name]
            fields[name] = known.default if known.off is None else known.off
    for name, value in changed.items():
        if name == "max_tokens":
            fields[dialect.max_tokens] = value
        elif name != "logprobs" and name not in _ALWAYS:
            fields[name] = value
    if params.wants_logprobs:
        fields["logprobs"] = True
    if params.logprobs:
        fields["top_logprobs"] = params.logprobs
    return fields


def encoded(body: Mapping[str, object]) -> bytes:
    """Return the body as JSON.

    Raises:
        RequestError: `body` has values that are not valid JSON.
    """
    try:
        return _encode(body).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"the request is not valid JSON: {exc}", hint="pass only JSON values") from exc


def _message(message: Message, dialect: Dialect, max_pixels: int | None) -> WireMessage:
    """Return the message; with its reasoning for endpoints that know vLLM's fields, others refuse what they do not."""
    content: str | list[WirePart] | None = None
    if any(not isinstance(part, TextPart) for part in message.parts):
        content = map_parts(
            message.parts,
            lambda part: {"type": "text", "text": part.text},
            lambda media: _shown(media, dialect, max_pixels),
        )
    elif message.parts or not message.tool_calls:
        content = message.text
    wire: WireMessage = {"role": message.role, "content": content}
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        wire["name"] = message.name
    if message.reasoning and dialect.pinned:
        # The name of SGLang and of vLLM's older versions, and that of its newer ones.
        wire["reasoning_content"] = wire["reasoning"] = message.reasoning
    return wire


def _shown(media: MediaPart, dialect: Dialect, max_pixels: int | None) -> WirePart:
    if isinstance(media, VideoPart):
        assert dialect.videos is not None
        more = part_fields(media.video, dialect.videos, max_pixels)
        return cast("WirePart", {"type": "video_url", "video_url": {"url": _MARK}, **more})
    return {"type": "image_url", "image_url": {"url": _MARK}}


def format_fields(response_format: ResponseFormat) -> WireBody:
    """Return the fields of the body for a response format."""
    match response_format.kind:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            closed = enforceable(response_format.schema or {}, "response_format")
            schema = {"name": response_format.name, "schema": closed, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case "regex":
            return {"structured_outputs": {"regex": response_format.pattern}}
        case "grammar":
            return {"structured_outputs": {"grammar": response_format.pattern}}
        case "choice":
            return {"structured_outputs": {"choice": list(response_format.choices)}}
    return {}


def _tools(request: ChatRequest) -> WireBody:
    if not request.tools:
        return {}
    fields: WireBody = {"tools": [], "tool_choice": request.tool_choice}
    for tool in request.tools:
        parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        strict = {"strict": True} if tool.strict else {}
        fields["tools"].append({"type": "function", "function": {**function, **strict}})
    if request.tool_choice not in ("none", "auto", "required"):
        fields["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    if not request.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields
