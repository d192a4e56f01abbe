"""Conversion of Anthropic's messages and content blocks to chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from qvl.pipeline.parse_fields import refuse_others, text_of, type_of, unknown, wrong
from qvl.pipeline.parse_parts import ContentPart, UnreadPicture, read_part, thoughts_of
from qvl.types import JsonMapping, JsonObject, TextPart

_ROLES: Final = ("user", "assistant", "system")
_OF_BYTES: Final = ("base64", "url")
_USER: Final = ("text", "image", "document", "tool_result")
_ASSISTANT: Final = ("text", "thinking", "redacted_thinking", "tool_use")
_RESULT: Final = ("text", "image", "document")
_LABELS: Final = frozenset({"cache_control", "caller", "citations"})


class Conversation:
    """Messages in the form of chat completions, and where in the request each picture stands.

    A `tool_result` becomes a turn of its own, at its place among the other blocks. What a model thought goes with its
    answer.

    Raises:
        RequestError: an invalid message or block; the error names it.
    """

    def __init__(self, messages: Sequence[JsonMapping], system: str | Sequence[JsonMapping] | None) -> None:
        self.messages: list[JsonObject] = []
        self.picture_params: list[str] = []
        if system:
            self.messages.append({"role": "system", "content": self._parts(system, "system", ("text",))})
        for number, message in enumerate(messages):
            self._read(message, f"messages[{number}]")

    @property
    def is_prefilled(self) -> bool:
        """True if the last message is the beginning of the answer."""
        last = self.messages[-1]
        return last["role"] == "assistant" and not last.get("tool_calls")

    def _read(self, message: JsonMapping, where: str) -> None:
        refuse_others(message, ("role", "content"), ("id", "type", "model"), where)
        role, content = text_of(message, "role", where), message.get("content")
        if role not in _ROLES:
            raise unknown(f"{where}.role", role, _ROLES)
        where = f"{where}.content"
        if role == "assistant":
            self._assistant(content, where)
        elif role == "system" or not isinstance(content, list):
            self._add(role, self._parts(content, where, ("text",)))
        else:
            self._user(content, where)

    def _add(self, role: str, parts: list[ContentPart], **fields: object) -> None:
        self.messages.append({"role": role, "content": parts, **fields})

    def _user(self, blocks: Sequence[object], where: str) -> None:
        parts: list[ContentPart] = []
        for number, block in enumerate(blocks):
            at = f"{where}[{number}]"
            if _kind(block, at, _USER) != "tool_result":
                parts += self._part(block, at)
                continue
            if parts:
                self._add("user", parts)
                parts = []
            assert isinstance(block, Mapping)
            self._result(block, at)
        if parts or not blocks:
            self._add("user", parts)

    def _result(self, block: JsonMapping, where: str) -> None:
        refuse_others(block, ("type", "tool_use_id", "content", "is_error"), _LABELS, where)
        content = block.get("content")
        parts = [] if content is None else self._parts(content, f"{where}.content", _RESULT)
        failed = block.get("is_error")
        if failed is not None and not isinstance(failed, bool):
            raise wrong(f"{where}.is_error", f"must be true or false, not {type_of(failed)}")
        if failed:
            # A tool's message has no field for it.
            parts.insert(0, TextPart("error: " if parts else "error"))
        self._add("tool", parts, tool_call_id=text_of(block, "tool_use_id", where))

    def _assistant(self, content: object, where: str) -> None:
        if not isinstance(content, list):
            self._add("assistant", self._parts(content, where, ("text",)))
            return
        parts: list[ContentPart] = []
        calls: list[JsonObject] = []
        fields: JsonObject = {"reasoning_content": thought} if (thought := thoughts_of(content)) else {}
        for number, block in enumerate(content):
            at = f"{where}[{number}]"
            kind = _kind(block, at, _ASSISTANT)
            assert isinstance(block, Mapping)
            if kind == "text":
                parts += self._part(block, at)
            elif kind == "tool_use":
                calls.append(_call(block, at))
        self._add("assistant", parts, **fields, **({"tool_calls": calls} if calls else {}))

    def _parts(self, content: object, where: str, kinds: Sequence[str]) -> list[ContentPart]:
        if isinstance(content, str):
            return [TextPart(content)] if content else []
        if not isinstance(content, list):
            fault = "is missing" if content is None else f"must be text or a list of blocks, not {type_of(content)}"
            raise wrong(where, fault)
        parts: list[ContentPart] = []
        for number, block in enumerate(content):
            _kind(block, f"{where}[{number}]", kinds)
            parts += self._part(block, f"{where}[{number}]")
        return parts

    def _part(self, block: object, where: str) -> list[ContentPart]:
        assert isinstance(block, Mapping)
        source = block.get("source")
        if block.get("type") == "document" and not (isinstance(source, Mapping) and source.get("type") in _OF_BYTES):
            return [_document(block, where)]
        part = read_part(block, where)
        if not isinstance(part, UnreadPicture):
            return [part]
        self.picture_params.append(f"{where}.source")
        return [*_labels(block), part]


def _kind(block: object, where: str, known: Sequence[str]) -> str:
    """Return the type of a content block."""
    if not isinstance(block, Mapping):
        raise wrong(where, f"must be a content block, not {type_of(block)}", '{"type": "text", "text": …}')
    kind = text_of(block, "type", where)
    if kind not in known:
        raise unknown(f"{where}.type", kind, known)
    return kind


def _call(block: JsonMapping, where: str) -> JsonObject:
    refuse_others(block, ("type", "id", "name", "input"), _LABELS, where)
    given = block.get("input")
    if not isinstance(given, Mapping):
        raise wrong(f"{where}.input", "is missing" if given is None else f"must be an object, not {type_of(given)}")
    name = text_of(block, "name", where)
    if not name:
        raise wrong(f"{where}.name", "is empty")
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": text_of(block, "id", where), "type": "function", "function": function}


def _document(block: JsonMapping, where: str) -> TextPart:
    """Return the text of a plain-text document, with its title before it."""
    refuse_others(block, ("type", "source", "title", "context"), _LABELS, where)
    source, at = block.get("source"), f"{where}.source"
    if not isinstance(source, Mapping):
        raise wrong(at, "is missing" if source is None else f"must be an object, not {type_of(source)}")
    if source.get("type") != "text":
        raise unknown(f"{at}.type", source.get("type"), ("text", *_OF_BYTES))
    refuse_others(source, ("type", "media_type", "data"), (), at)
    named = [part.text for part in _labels(block)]
    return TextPart("\n".join([*named, text_of(source, "data", at)]))


def _labels(block: JsonMapping) -> list[TextPart]:
    """Return what a document's sender says of it, which stands before it."""
    if block.get("type") != "document":
        return []
    return [TextPart(str(block[name])) for name in ("title", "context") if block.get(name)]
