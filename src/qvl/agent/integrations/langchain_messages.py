"""Conversion of LangChain's messages to OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Final

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from qvl.errors import UnsupportedInputError
from qvl.media.sources import is_address
from qvl.pipeline.parse_parts import ContentPart, UnreadPicture, read_part
from qvl.types import JsonObject, TextPart

# Blocks that say again what stands in another field of their message, or what the model thought.
_ELSEWHERE: Final = frozenset(
    {"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "reasoning", "thinking"}
)
# What only its own provider can read of an earlier answer.
_ITS_OWN: Final = frozenset(
    {"function_call", "redacted_thinking", "reasoning_content", "non_standard", "non_standard_annotation"}
    | {"server_tool_use", "server_tool_call", "server_tool_call_chunk", "server_tool_result"}
)


def to_qvl(messages: Sequence[BaseMessage]) -> list[JsonObject]:
    """Return LangChain's messages in OpenAI's format, pictures as content parts.

    Raises:
        RequestError: a content block that is neither text nor a picture, or a picture that is a file.
    """
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: BaseMessage, where: str) -> JsonObject:
    skipped = _ELSEWHERE | _ITS_OWN if isinstance(message, AIMessage) else _ELSEWHERE
    fields: JsonObject = {"content": _content(message.content, skipped, f"{where}.content")}
    if isinstance(message, SystemMessage):
        return {"role": "system", **fields}
    if isinstance(message, AIMessage):
        calls = [
            {"id": call["id"] or "", "function": {"name": call["name"], "arguments": json.dumps(call["args"])}}
            for call in message.tool_calls
        ]
        calls += [
            {"id": bad["id"] or "", "function": {"name": bad["name"], "arguments": bad["args"] or "{}"}}
            for bad in message.invalid_tool_calls
            if bad["name"]
        ]
        return {"role": "assistant", **fields, **({"tool_calls": calls} if calls else {})}
    if isinstance(message, ToolMessage):
        return {"role": "tool", **fields, "tool_call_id": message.tool_call_id}
    if isinstance(message, HumanMessage):
        return {"role": "user", **fields, **({"name": message.name} if message.name else {})}
    if isinstance(message, ChatMessage):
        return {"role": message.role, **fields}
    raise UnsupportedInputError(f"unsupported message type {type(message).__name__}", param="messages")


def _content(content: str | Sequence[object], skipped: frozenset[str], where: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    parts: list[ContentPart] = []
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(block, Mapping) and kind == "tool_result":
            parts += _tool_result(block.get("content"), skipped, f"{where}[{number}].content")
        elif not isinstance(kind, str) or kind not in skipped:
            parts.append(part_of(block, f"{where}[{number}]"))
    return parts


def _tool_result(inner: object, skipped: frozenset[str], where: str) -> list[ContentPart]:
    if isinstance(inner, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in inner
    ):
        return [part for part in _content(inner, skipped, where) if not isinstance(part, str)]
    return [TextPart("" if inner is None else inner if isinstance(inner, str) else json.dumps(inner))]


def part_of(block: object, where: str) -> ContentPart:
    """Return a content block as a part.

    Raises:
        RequestError: it is neither text nor a picture, or a picture that is a file.
    """
    part = read_part(block, where)
    source = part.source if isinstance(part, UnreadPicture) else None
    if isinstance(source, str | PathLike) and not is_address(source):
        raise UnsupportedInputError(f"{where}: a picture in a message must be a URL or base64, not a file", param=where)
    return part
