"""Incremental parsing of tool calls in Qwen's format: `{"name": …, "arguments": …}`."""

from __future__ import annotations

import json
import re
from typing import Final

# What models put around their calls: a code fence, the bracket of a list.
_LEAD: Final = re.compile(r"\s*(?:`{1,3}(?:json|jso|js|j)?\s*)?(?:\[\s*)?")
# How a call begins that can be handed out before it is whole.
_BEGINNING: Final = re.compile(
    _LEAD.pattern + r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_ARGUMENTS: Final = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_LENIENT: Final = json.JSONDecoder(strict=False)


class ObjectScanner:
    """Finds the end of a JSON object in streamed text; `feed` takes the whole text so far, not the new piece.

    `end` is the index after the object, None until it is complete. `other` is True if the text is not an object. A
    code fence or the bracket of a list may precede the object.
    """

    __slots__ = ("_at", "_depth", "_escaped", "_in_text", "end", "other")

    def __init__(self) -> None:
        self.end: int | None = None
        self.other = False
        self._at = 0
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def feed(self, text: str) -> None:
        if not self._at:
            lead = lead_of(text)
            if lead == len(text):
                return
            self._at, self.other = lead, text[lead] != "{"
        while self.end is None and not self.other and self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = char == "\\", char != '"'
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.end = self._at


def lead_of(text: str) -> int:
    """Return the length of the code fence, brackets or white space that precede a call in `text`."""
    lead = _LEAD.match(text)
    return lead.end() if lead else 0


class CallReader:
    """Parses one tool call while it is streamed.

    `started` is True once `name` is complete; from then on `feed` returns pieces of the arguments.
    """

    __slots__ = ("_arguments", "_at", "_begins", "_escaper", "name", "started")

    def __init__(self) -> None:
        self.name: str | None = None
        self.started = False
        self._begins: int | None = None  # where the arguments begin, if they can be handed out as they come
        self._arguments = ObjectScanner()
        self._at = 0
        self._escaper = ControlEscaper()

    def feed(self, body: str, *, whole: bool) -> str:
        """Return the new piece of the arguments; `body`: the call's text so far; `whole`: True if it is complete."""
        if not self.started and (beginning := _BEGINNING.match(body)) and body[beginning.end()] == "{":
            self._begins = beginning.end()
            self.name, self.started = _LENIENT.decode(beginning.group(1)), True
        if self._begins is not None:
            text = body[self._begins :]
            self._arguments.feed(text)
            end = len(text) if self._arguments.end is None else self._arguments.end
            piece, self._at = text[self._at : end], max(self._at, end)
            return self._escaper.write(piece)
        if whole and (call := parse_call(body)) is not None:
            self.name, self.started = call[0], True
            return call[1]
        return ""


class ControlEscaper:
    """Escapes control characters in strings of streamed JSON, where models write line breaks unescaped."""

    __slots__ = ("_escaped", "_in_text")

    def __init__(self) -> None:
        self._in_text = False
        self._escaped = False

    def write(self, piece: str) -> str:
        written: list[str] = []
        for char in piece:
            written.append(json.dumps(char)[1:-1] if self._in_text and char < " " else char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = self._in_text
            elif char == '"':
                self._in_text = not self._in_text
        return "".join(written)


def parse_call(block: str) -> tuple[str, str] | None:
    """Return (name, arguments as the model's JSON text) of a `<tool_call>` block; None if it is not a call.

    Arguments that are null, missing or empty are returned as `{}`; of a JSON string, its text is returned.
    """
    try:
        call = _LENIENT.decode(block[lead_of(block) :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call["arguments"] if "arguments" in call else call.get("parameters")
    if isinstance(arguments, str):
        text = arguments.strip()
        return call["name"], "{}" if text in ("", "null", "None") else ControlEscaper().write(arguments)
    if arguments is None or arguments == []:
        return call["name"], "{}"
    for key in _ARGUMENTS.finditer(block):
        try:
            value, end = _LENIENT.raw_decode(block, key.end())
        except ValueError:
            continue
        if value == arguments:
            return call["name"], ControlEscaper().write(block[key.end() : end])
    return call["name"], json.dumps(arguments, ensure_ascii=False)
