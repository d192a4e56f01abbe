"""Between our types and the wire format of `/v1/chat/completions`.

`request_body` writes a ChatRequest; `AnswerReader` reads the events of the stream. What servers add to OpenAI's format
is understood too: reasoning as `reasoning_content`, `reasoning` or an inline `<think>` block, logprobs with raw bytes,
picture tokens in the usage.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from qvl.backends.failures import broken, cut_off, from_event
from qvl.backends.sse import readable, shorten
from qvl.errors import BackendResponseError, RequestError, UnsupportedInputError
from qvl.types import (
    ChatRequest,
    Chunk,
    FinishReason,
    ImagePart,
    Message,
    ResponseFormat,
    TokenLogprob,
    ToolCallDelta,
    Usage,
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
_FINISH: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_decode: Final = json.JSONDecoder().decode
_IMAGE_TOKENS: Final = ("image_tokens", "vision_tokens", "multimodal_tokens")


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


def _add_format(body: dict[str, Any], wanted: ResponseFormat) -> None:
    if wanted.kind == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif wanted.kind == "json_schema":
        schema = {"name": wanted.name, "schema": dict(wanted.schema or {}), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif wanted.kind == "regex":
        body["structured_outputs"] = {"regex": wanted.pattern}
    elif wanted.kind == "choice":
        body["structured_outputs"] = {"choice": list(wanted.choices)}


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


class ThinkSplitter:
    """Moves a leading `<think>…</think>` out of the text of one choice, also when a tag comes in pieces."""

    __slots__ = ("_pending", "_state")

    def __init__(self) -> None:
        self._state = "start"
        self._pending = ""

    def split(self, text: str) -> tuple[str, str]:
        """(text, reasoning) of this piece; what may be the beginning of a tag is kept back."""
        if self._state == "text":
            return text, ""
        if self._state == "gap":
            return self._after(text), ""
        self._pending += text
        if self._state == "start":
            lead = self._pending.lstrip()
            if lead.startswith("<think>"):
                self._state, self._pending = "think", lead[len("<think>") :].lstrip("\n")
            elif "<think>".startswith(lead):
                return "", ""
            else:
                return self._to_text(self._pending), ""
        return self._thinking()

    def flush(self) -> tuple[str, str]:
        """What was kept back when the choice ended."""
        rest, self._pending = self._pending, ""
        return ("", rest) if self._state == "think" else (rest, "")

    def _thinking(self) -> tuple[str, str]:
        before, tag, after = self._pending.partition("</think>")
        if tag:
            self._state, self._pending = "gap", ""
            return self._after(after), before.rstrip("\n")
        keep = next((n for n in range(7, 0, -1) if before.endswith("</think>"[:n])), 0)
        self._pending = before[len(before) - keep :]
        return "", before[: len(before) - keep]

    def _after(self, text: str) -> str:
        """The line ends between the block and the answer belong to neither."""
        rest = text.lstrip("\n")
        if rest:
            self._state = "text"
        return rest

    def _to_text(self, text: str) -> str:
        self._state, self._pending = "text", ""
        return text


class AnswerReader:
    """Folds nothing, only translates: feed it event payloads, get Chunks.

    The chunk with the finish_reason is held back until the usage has come, so that the last chunk of the stream carries
    both.

    Raises:
        Failed: (from `read` and `end`) an error event, an event that makes no sense, an answer that is not whole.
    """

    def __init__(self, *, n: int, where: str) -> None:
        self._n = n
        self._where = where
        self._think: dict[int, ThinkSplitter] = {}
        self._finished: set[int] = set()
        self._called: set[int] = set()
        self._held: Chunk | None = None
        self.usage = Usage()
        self.done = False

    def read(self, payload: bytes) -> list[Chunk]:
        """The chunks of one event. `done` is set by `[DONE]`."""
        if payload.strip() == b"[DONE]":
            self.done = True
            return []
        event = self._parse(payload)
        if event.get("error") or event.get("object") == "error":
            raise from_event(event.get("error") or event, self._where)
        if "choices" not in event and ("detail" in event or "message" in event):
            raise from_event(event, self._where)
        chunks: list[Chunk] = []
        try:
            if event.get("usage"):
                self.usage = read_usage(event["usage"])
            for choice in event.get("choices") or ():
                chunks += self._choice(choice)
        except (TypeError, ValueError, KeyError, AttributeError) as exc:
            raise broken(f"an event that makes no sense: {readable(payload)}", self._where) from exc
        if chunks and self._held is not None:
            chunks.insert(0, self._held)
            self._held = None
        if chunks and chunks[-1].finish_reason is not None:
            self._held = chunks.pop()
        return chunks

    def end(self) -> Chunk:
        """The last chunk, with finish_reason and usage."""
        if self._held is None or len(self._finished) < self._n:
            if not self._finished and not self._think:
                raise cut_off("the stream ended without an answer", self._where)
            if self._finished and len(self._finished) < self._n and self._held is not None:
                raise broken(f"{len(self._finished)} answers came, n={self._n} were asked for", self._where)
            raise cut_off("the stream broke off before the answer was whole", self._where)
        return replace(self._held, usage=self.usage)

    def _parse(self, payload: bytes) -> Mapping[str, Any]:
        try:
            event = _decode(payload.decode())
        except UnicodeDecodeError as exc:
            raise broken(f"the stream is not UTF-8: {readable(payload)}", self._where) from exc
        except (ValueError, RecursionError) as exc:
            raise broken(f"the stream has broken JSON: {readable(payload)}", self._where) from exc
        if not isinstance(event, Mapping):
            raise broken(f"an event that is no object: {readable(payload)}", self._where)
        return event

    def _choice(self, choice: Mapping[str, Any]) -> list[Chunk]:
        index = int(choice.get("index") or 0)
        delta: Mapping[str, Any] = choice.get("delta") or choice.get("message") or {}
        splitter = self._think.setdefault(index, ThinkSplitter())
        text, reasoning = splitter.split(_content(delta.get("content")))
        reasoning = (delta.get("reasoning_content") or delta.get("reasoning") or "") + reasoning
        calls = tuple(_tool_delta(call, place) for place, call in enumerate(delta.get("tool_calls") or ()))
        if calls:
            self._called.add(index)
        finish = self._finish(choice.get("finish_reason"), index)
        if finish is not None:
            rest, rest_reasoning = splitter.flush()
            text, reasoning = text + rest, reasoning + rest_reasoning
            self._finished.add(index)
        logprobs = _logprobs(choice.get("logprobs"))
        if not (text or reasoning or calls or logprobs or finish):
            return []
        return [
            Chunk(
                text=text,
                index=index,
                reasoning=reasoning,
                tool_calls=calls,
                logprobs=logprobs,
                finish_reason=finish,
            )
        ]

    def _finish(self, reason: str | None, index: int) -> FinishReason | None:
        if not reason:
            return None
        known = _FINISH.get(reason)
        if known == "stop" and index in self._called:
            return "tool_calls"
        if known is not None:
            return known
        if reason == "content_filter":
            raise refused_answer("the endpoint's content filter withheld the answer", self._where, reason)
        raise refused_answer(f"the endpoint gave the answer up: {shorten(reason)}", self._where, None)


def refused_answer(message: str, where: str, code: str | None) -> Exception:
    failed = broken(message, where)
    failed.error = BackendResponseError(f"{where}: {message}", code=code)
    return failed


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Token counts out of an OpenAI usage object; what it does not say is 0."""
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        image_tokens=int(next((details[name] for name in _IMAGE_TOKENS if details.get(name)), 0)),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


def _content(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    # Some gateways stream content as parts.
    return "".join(part.get("text") or "" for part in cast("list[dict[str, Any]]", content))


def _tool_delta(call: Mapping[str, Any], place: int) -> ToolCallDelta:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    index = call.get("index")
    return ToolCallDelta(
        index=place if index is None else int(index),
        id=call.get("id") or None,
        name=function.get("name") or None,
        arguments=arguments if isinstance(arguments, str) else "" if arguments is None else json.dumps(arguments),
    )


def _logprobs(logprobs: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    return tuple(_logprob(item) for item in (logprobs or {}).get("content") or ())


def _logprob(item: Mapping[str, Any]) -> TokenLogprob:
    raw = item.get("bytes")
    return TokenLogprob(
        token=item["token"],
        logprob=float(item["logprob"]),
        bytes=bytes(raw) if raw is not None else item["token"].encode(),
        top=tuple(_logprob(top) for top in item.get("top_logprobs") or ()),
    )
