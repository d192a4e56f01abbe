"""Conversion of the Responses API's input items to chat messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from qvl.pipeline.parse_fields import refuse_others, text_of, unknown, wrong
from qvl.pipeline.parse_parts import picture_texts, read_content
from qvl.server.signing import read_signed
from qvl.types import JsonMapping, JsonObject

KINDS: Final = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_ROLES: Final = ("user", "assistant", "system", "developer")
_ECHOES: Final = frozenset(
    {"id", "status", "phase", "parsed_arguments", "metadata", "cache_control", "namespace", "caller", "created_by"}
)


def item_texts(items: str | Iterable[JsonMapping]) -> Iterable[str]:
    """Return the texts of an input that `messages_of` may take for a picture's source."""
    return () if isinstance(items, str) else picture_texts(items, "content", "output")


def messages_of(items: Sequence[JsonMapping], key: bytes, name: str = "input") -> list[JsonObject]:
    """Return the chat messages with parsed parts; consecutive function calls become one assistant message.

    What a model thought before an answer goes with that answer; a signed copy of it is checked with `key`.

    Raises:
        RequestError: an invalid item; the error names the item (of `name`), the part and the field.
    """
    messages: list[JsonObject] = []
    thought = ""
    for number, item in enumerate(items):
        where = f"{name}[{number}]"
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            messages.append(_message(item, where) | _thought(item.get("role"), thought))
        elif kind == "function_call":
            call = _call(item, where)
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
                messages[-1] = _thought("assistant", thought) | messages[-1]
            else:
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
                messages.append(message | _thought("assistant", thought))
        elif kind == "function_call_output":
            refuse_others(item, ("type", "call_id", "output"), _ECHOES | {"name"}, where)
            output = read_content(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": text_of(item, "call_id", where), "content": output})
        elif kind is None:
            raise wrong(f"{where}.role", "is missing", f"known: {', '.join(_ROLES)}")
        elif kind == "reasoning":
            thought += _reasoning(item, key, where)
        else:
            raise unknown(f"{where}.type", kind, KINDS)
        if kind != "reasoning":
            thought = ""
    return messages


def _reasoning(item: JsonMapping, key: bytes, where: str) -> str:
    """Return the text of a reasoning item: what is signed, else its content, else its summary."""
    if item.get("encrypted_content") is not None:
        blob = text_of(item, "encrypted_content", where)
        return read_signed(blob, key, f"{where}.encrypted_content")
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise wrong(f"{where}.{name}", "must be a list of parts")
        if parts:
            return "".join(text_of(part, "text", f"{where}.{name}[{n}]") for n, part in enumerate(parts))
    return ""


def _thought(role: object, thought: str) -> JsonObject:
    return {"reasoning_content": thought} if role == "assistant" and thought else {}


def _message(item: JsonMapping, where: str) -> JsonObject:
    refuse_others(item, ("type", "role", "content"), _ECHOES, where)
    role = text_of(item, "role", where)
    if role not in _ROLES:
        raise unknown(f"{where}.role", role, _ROLES)
    return {"role": role, "content": read_content(item.get("content"), f"{where}.content", role=role)}


def _call(item: JsonMapping, where: str) -> JsonObject:
    # One that was not waited for (`async` true) is no call as the model's template knows it.
    told = {name: value for name, value in item.items() if name != "async" or value is not False}
    refuse_others(told, ("type", "call_id", "name", "arguments"), _ECHOES, where)
    name = text_of(item, "name", where)
    if not name:
        raise wrong(f"{where}.name", "is empty")
    function = {"name": name, "arguments": text_of(item, "arguments", where)}
    return {"id": text_of(item, "call_id", where), "type": "function", "function": function}
