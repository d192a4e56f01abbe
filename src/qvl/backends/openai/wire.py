"""Writes a ChatRequest in the wire format of `/v1/chat/completions`; `answer_reader` reads what comes back."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qvl.backends.grammar_schema import enforceable
from qvl.errors import RequestError, UnsupportedInputError
from qvl.types import (
    ChatRequest,
    ImagePart,
    Message,
    ResponseFormat,
)

OPENAI_SAMPLING: Final = frozenset(
    {
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "logprobs",
        "n",
    }
)
EXTRA_SAMPLING: Final = frozenset({"top_k", "min_p", "stop_token_ids", "ignore_eos", "repetition_penalty"})
_RESERVED: Final = frozenset({"model", "messages", "stream", "stream_options"})
_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one endpoint wants to be spoken to.

    `pinned` are the sampling fields beyond OpenAI's that are sent even at their defaults: vLLM and SGLang otherwise
    take the checkpoint's generation_config, so a greedy request would get a repetition penalty nobody asked for.
    `sampled` is false for models that refuse a temperature.
    """

    max_tokens: str = "max_tokens"
    stream_options: bool = True
    sampled: bool = True
    pinned: frozenset[str] = frozenset()


def request_body(request: ChatRequest, model: str, dialect: Dialect) -> bytes:
    """The body of a streamed chat completion, as it goes on the wire.

    Pictures come in last, as bytes: a JSON encoder takes longer over a megabyte of base64 than writing it takes.

    Raises:
        UnsupportedInputError: `extra` names a field that is ours to set.
        RequestError: it holds what JSON cannot carry.
    """
    # Nobody can have written this in a text of theirs.
    mark = os.urandom(16).hex()
    text, *behind = encoded(_body(request, model, dialect, mark)).split(f'"{mark}"'.encode())
    pieces = [text]
    for picture, rest in zip(request.pictures, behind, strict=True):
        fitting = picture if request.max_pixels is None else picture.fit(request.max_pixels)
        data = fitting.data
        pieces += (f'"data:{fitting.media_type};base64,'.encode(), base64.b64encode(data), b'"', rest)
    return b"".join(pieces)


def _body(request: ChatRequest, model: str, dialect: Dialect, mark: str) -> dict[str, Any]:
    """The same before it is encoded, with `mark` in the place of every picture."""
    params = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(message, mark) for message in request.messages],
        "stream": True,
    }
    if dialect.stream_options:
        body["stream_options"] = {"include_usage": True}
    if dialect.sampled:
        body["temperature"] = params.temperature
        body["top_p"] = params.top_p
    if params.max_tokens is not None:
        body[dialect.max_tokens] = params.max_tokens
    changed = params.changed()
    for name in ("stop", "presence_penalty", "frequency_penalty", "seed", "n"):
        if name in changed:
            body[name] = list(params.stop) if name == "stop" else changed[name]
    if params.logprobs is not None:
        body["logprobs"] = True
        if params.logprobs:
            body["top_logprobs"] = params.logprobs
    for name in EXTRA_SAMPLING:
        if name in changed or name in dialect.pinned:
            body[name] = getattr(params, name)
    if request.cache_salt and dialect.pinned:
        # An endpoint that knows vLLM's fields has a prefix cache to keep apart; others refuse what they do not know.
        body["cache_salt"] = request.cache_salt
    if body.get("top_k") == 0:
        body["top_k"] = -1
    _add_format(body, request.response_format)
    _add_tools(body, request)
    for name, value in request.extra.items():
        if name in _RESERVED:
            raise UnsupportedInputError(f"{name!r} cannot be set as an extra field", param=name)
        body[name] = value
    return body


def encoded(body: Mapping[str, Any]) -> bytes:
    """The body as it goes on the wire.

    Raises:
        RequestError: it holds what JSON cannot carry.
    """
    try:
        return _encode(body).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"the request cannot be sent: {exc}", hint="pass only JSON values") from exc


def _message(message: Message, mark: str) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role}
    if message.pictures:
        wire["content"] = [
            {"type": "image_url", "image_url": {"url": mark}}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in message.parts
        ]
    else:
        wire["content"] = None if message.tool_calls and not message.parts else message.text
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        wire["name"] = message.name
    return wire


def _add_format(body: dict[str, Any], response_format: ResponseFormat) -> None:
    if response_format.kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif response_format.kind == "json_schema":
        closed = enforceable(response_format.schema or {}, "response_format")
        schema = {"name": response_format.name, "schema": closed, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif response_format.kind == "regex":
        body["structured_outputs"] = {"regex": response_format.pattern}
    elif response_format.kind == "choice":
        body["structured_outputs"] = {"choice": list(response_format.choices)}


def _add_tools(body: dict[str, Any], request: ChatRequest) -> None:
    if not request.tools:
        return
    body["tools"] = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters) or {"type": "object", "properties": {}},
                **({"strict": True} if tool.strict else {}),
            },
        }
        for tool in request.tools
    ]
    choice = request.tool_choice
    named = choice not in ("none", "auto", "required")
    body["tool_choice"] = {"type": "function", "function": {"name": choice}} if named else choice
    if not request.parallel_tool_calls:
        body["parallel_tool_calls"] = False
