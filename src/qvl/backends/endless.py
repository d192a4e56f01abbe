"""Detects answers that repeat the same text endlessly, so that they end before max_tokens."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from qvl.errors import BackendResponseError

if TYPE_CHECKING:
    from qvl.types import ChatRequest, Chunk

LONGEST_RUN: Final = 128
LONGEST_UNIT: Final = 6
# Equal items of a list are told apart later: a mask or a histogram may well have some hundred zeros.
_LIST: Final = 8
_BLANK_ESCAPES: Final = frozenset({"\\n", "\\r", "\\t", "\\f"})
_AT_LEAST: Final = re.compile(r"\{([0-9]{1,6})(?:,[0-9]*)?\}")


class RunWatch:
    """Detects up to six characters, or white space, repeated `longest` times; a JSON escape is one character."""

    def __init__(self, longest: int = LONGEST_RUN) -> None:
        self._longest = longest
        self._pending = ""  # an escape that is not whole yet
        self._blanks = 0
        self._recent: deque[str] = deque(maxlen=LONGEST_UNIT)
        self._same = [0] * (LONGEST_UNIT + 1)

    def feed(self, text: str) -> str:
        """Return the repeated text once it was repeated too often, else ""."""
        for char in text:
            unit = self._pending + char
            if unit[0] == "\\" and len(unit) < (6 if unit[1:2] == "u" else 2):
                self._pending = unit
                continue
            self._pending = ""
            if repeated := self._count(unit):
                return repeated
        return ""

    def _count(self, unit: str) -> str:
        self._blanks = self._blanks + 1 if _is_blank(unit) else 0
        if self._blanks >= self._longest:
            return unit
        recent, same, repeated = self._recent, self._same, ""
        for period in range(1, LONGEST_UNIT + 1):
            if len(recent) < period or recent[-period] != unit:
                same[period] = 0
                continue
            same[period] += 1
            if not repeated and same[period] >= period * (self._longest - 1):
                candidate = "".join([*recent, unit][-period:])
                many = _LIST * self._longest if period > 1 and "," in candidate else self._longest
                repeated = candidate if same[period] >= period * (many - 1) else ""
        recent.append(unit)
        return repeated


class EndlessWatch:
    """Detects repetition in each choice and tool call of one structured answer."""

    def __init__(self, request: ChatRequest) -> None:
        self._longest = longest_run(request)
        self._parts: dict[tuple[int, int | None], RunWatch] = {}

    def read(self, chunk: Chunk) -> None:
        """Check the next chunk.

        Raises:
            BackendResponseError: the answer repeats itself endlessly.
        """
        if not self._longest:
            return
        pieces = [(None, chunk.text), *((call.index, call.arguments) for call in chunk.tool_calls)]
        for call, text in pieces:
            if text:
                watch = self._parts.setdefault((chunk.index, call), RunWatch(self._longest))
                if repeated := watch.feed(text):
                    raise endless(repeated, self._longest)


def endless(repeated: str, longest: int) -> BackendResponseError:
    """Return the error of an answer that repeats the text `repeated` `longest` times."""
    what = "white space" if _is_blank(repeated) else repr(repeated)
    return BackendResponseError(
        f"the model wrote {what} {longest} times in a row inside an answer that must have a form",
        hint="bound the field in the schema (maxLength, maximum), or ask a larger model",
        code="endless_answer",
    )


def longest_run(request: ChatRequest) -> int:
    """Return the most repetitions allowed in the answer; 0 (no limit) for free text or a format that requires them."""
    form, forced = request.response_format, request.forced_tools
    if form.kind == "text" and not forced:
        return 0
    texts, patterns = list(form.choices), [form.pattern or ""]
    for schema in (form.schema, *(tool.parameters for tool in forced)):
        for word, text in _texts(schema):
            (patterns if word == "pattern" else texts).append(text)
    if any(len(text) >= LONGEST_RUN and RunWatch().feed(text) for text in (*texts, *patterns)):
        return 0
    return LONGEST_RUN + max(map(_demanded, patterns))


def _demanded(pattern: str) -> int:
    """Return a rough minimum of repetitions that the braces of a pattern require."""
    product = 1
    for braces in _AT_LEAST.finditer(pattern):
        product = min(product * max(1, int(braces.group(1))), 1 << 20)
    return product - 1


def _texts(schema: object) -> Iterator[tuple[str, str]]:
    """Yield (keyword, JSON text of its value) of `const`, `enum` and `pattern`; not of annotations."""
    pending: list[tuple[str, object]] = [("", schema)]
    while pending:
        word, node = pending.pop()
        if isinstance(node, Mapping):
            inside = word in ("const", "enum")
            pending += ((word if inside else str(key), value) for key, value in node.items())
        elif isinstance(node, list | tuple):
            pending += ((word, value) for value in node)
        elif word == "pattern" and isinstance(node, str):
            yield word, node
        elif word in ("const", "enum") and isinstance(node, str | int | float):
            try:
                yield word, json.dumps(node)
            except ValueError:
                continue  # a number too long to be written, which no schema is compiled with


def _is_blank(unit: str) -> bool:
    return unit.isspace() or unit in _BLANK_ESCAPES or (unit[:2] == "\\u" and _of_escape(unit).isspace())


def _of_escape(unit: str) -> str:
    try:
        return chr(int(unit[2:], 16))
    except ValueError:
        return ""
