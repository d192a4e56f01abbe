"""Parser of one chat message: OpenAI's format and common extensions of other servers and clients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel

from qvl.pipeline.parse_fields import refuse_others, text_of, type_of, unknown, wrong
from qvl.pipeline.parse_parts import ContentPart, read_content, thoughts_of
from qvl.types import MAPPINGS, JsonMapping, Message, TextPart, ToolCall

MessageLike: TypeAlias = Message | JsonMapping
Turn: TypeAlias = tuple[Message, tuple[ContentPart, ...]]
_ROLES: Final[Mapping[str, Literal["system", "user", "assistant", "tool"]]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_FIELDS: Final = ("role", "content", "name")
_OWN: Final[Mapping[str, tuple[str, ...]]] = {"assistant": ("tool_calls", "refusal"), "tool": ("tool_call_id",)}
# Where clients send back what a model thought before its answer.
_THOUGHTS: Final = ("reasoning_content", "reasoning", "reasoning_text", "thinking")
# What comes with an answer and is sent back with it. None of it but the reasoning is shown to the model again.
_ECHOES: Final = frozenset(
    {"id", "status", "metadata", "cache_control", "phase", "index", "created", "model"}
    | {"native_finish_reason", "extra_content", "content_filter_results", "context", "executed_tools"}
    | {"is_error", "artifact", "citations"}
    | {"parsed", "annotations", "provider_specific_fields", "logprobs", "finish_reason", "stop_reason", "token_ids"}
    | {*_THOUGHTS, "reasoning_details", "thinking_blocks"}
)
# Fields that say nothing at these values, as clients fill them in.
_EMPTY: Final[Mapping[str, object]] = {"images": [], "tool_calls": [], "audio": {}, "prefix": False}
_CALL: Final = ("id", "type", "function")
_CALL_ECHOES: Final = frozenset({"index", "provider_specific_fields", "extra_content", "cache_control"})
_FUNCTION_ECHOES: Final = frozenset({"parsed_arguments", "provider_specific_fields", "strict"})


def read_turn(message: object, where: str) -> Turn:
    """Return the message at path `where` and its content parts, pictures not yet loaded.

    Raises:
        RequestError: an invalid field; the error names it and the known values.
    """
    if isinstance(message, Message):
        return message, message.parts
    if not isinstance(message, dict) and isinstance(message, BaseModel):
        message = message.model_dump(warnings=False)
    if not isinstance(message, MAPPINGS):
        raise wrong(where, f"must be a message, not {type_of(message)}", '{"role": "user", "content": …}')
    word = message.get("role")
    role = _ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        at = f"{where}.role"
        raise wrong(at, "is missing", ", ".join(_ROLES)) if word is None else unknown(at, word, tuple(_ROLES))
    own = _OWN.get(role, ())
    telling = message
    if not _EMPTY.keys().isdisjoint(message):
        telling = {name: value for name, value in message.items() if name not in _EMPTY or not _is_empty(name, value)}
    refuse_others(telling, (*_FIELDS, *own), _ECHOES, where)
    calls = message.get("tool_calls")
    parts = _parts(message, role, where)
    turn = Message(
        role=role,
        tool_calls=() if calls is None else _calls(calls, f"{where}.tool_calls"),
        tool_call_id=text_of(message, "tool_call_id", where) if role == "tool" else None,
        name=text_of(message, "name", where) if message.get("name") is not None else None,
        reasoning=_reasoning(message, where) if role == "assistant" else "",
    )
    return turn, tuple(parts)


def _is_empty(name: str, value: object) -> bool:
    return type(value) is type(_EMPTY[name]) and bool(value == _EMPTY[name])


def _reasoning(message: JsonMapping, where: str) -> str:
    if message.get("reasoning_content") is not None:
        return text_of(message, "reasoning_content", where)
    told = next((value for name in _THOUGHTS if (value := message.get(name)) and isinstance(value, str)), "")
    return told or thoughts_of(message.get("content"))


def _parts(message: JsonMapping, role: str, where: str) -> Sequence[ContentPart]:
    content = message.get("content")
    if content is None and role == "assistant":
        # Where an earlier answer was a refusal, that is what was said.
        return [TextPart(text_of(message, "refusal", where))] if message.get("refusal") else []
    return read_content(content, f"{where}.content", role=role)


def _calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Iterable):
        raise wrong(where, f"must be a list of calls, not {type_of(calls)}")
    return tuple(_call(call, f"{where}[{number}]") for number, call in enumerate(calls))


def _call(call: object, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping):
        raise wrong(where, f"must be a call, not {type_of(call)}")
    if call.get("type", "function") not in ("function", None):
        raise unknown(f"{where}.type", call["type"], ("function",))
    refuse_others(call, _CALL, _CALL_ECHOES, where)
    function = call.get("function")
    if not isinstance(function, Mapping):
        fault = "is missing" if function is None else f"must be an object, not {type_of(function)}"
        raise wrong(f"{where}.function", fault)
    refuse_others(function, ("name", "arguments"), _FUNCTION_ECHOES, f"{where}.function")
    name = text_of(function, "name", f"{where}.function")
    if not name:
        raise wrong(f"{where}.function.name", "is empty")
    ident = text_of(call, "id", where) if call.get("id") is not None else ""
    return ToolCall(ident, name, _arguments(function.get("arguments"), f"{where}.function.arguments"))


def _arguments(arguments: object, where: str) -> str:
    if arguments is None or isinstance(arguments, str):
        return arguments or "{}"
    if not isinstance(arguments, Mapping):
        raise wrong(where, f"must be JSON as text, not {type_of(arguments)}")
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise wrong(where, f"cannot be written as JSON: {exc}") from exc
