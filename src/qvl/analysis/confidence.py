"""The model's confidence in each value of a JSON answer, from the probabilities of its tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Final

from qvl.types import TokenLogprob

CONFIDENCE_METHOD: Final = "token_probability_product"


@dataclass(frozen=True, slots=True)
class _Span:
    """The characters [start, end) of the JSON text that spell the value at `path`."""

    path: str
    start: int
    end: int


def value_spans(text: str, start: int | None = None) -> list[_Span]:
    """Return path (like `items.0.name`) and position of each scalar in the JSON object at `start` (None: the first)."""
    start = text.find("{") if start is None else start
    if start < 0:
        return []
    try:
        return list(_walk(text, start, ""))
    except (ValueError, IndexError, StopIteration, RecursionError):
        return []


def _skip(text: str, i: int) -> int:
    while text[i] in " \t\r\n":
        i += 1
    return i


def _walk(text: str, i: int, path: str) -> Iterator[_Span]:
    """Yield the span of each leaf of the JSON value that starts at `i`; the json module finds where the value ends."""
    opening = text[i]
    if opening not in "{[":
        _, end = json.JSONDecoder().raw_decode(text, i)
        yield _Span(path, i, end)
        return
    closing = "}" if opening == "{" else "]"
    i = _skip(text, i + 1)
    number = 0
    while text[i] != closing:
        name = str(number)
        if opening == "{":
            name, i = scanstring(text, i + 1)
            i = _skip(text, _skip(text, i) + 1)
        yield from _walk(text, i, f"{path}.{name}" if path else name)
        _, i = json.JSONDecoder().raw_decode(text, i)
        i = _skip(text, i)
        if text[i] == ",":
            i = _skip(text, i + 1)
        number += 1


def confidences(
    text: str, logprobs: Sequence[TokenLogprob] | None, start: int | None = None
) -> tuple[float | None, dict[str, float]]:
    """Return the confidence (0 to 1) in the answer `text`, and in each scalar by path (see `value_spans`).

    It is (None, {}) if `logprobs` do not spell `text`. A token that spells parts of two values counts for both. Quotes
    belong to their value, since the opening one decides between a string and null. Keys are not counted.
    """
    if not logprobs:
        return None, {}
    spelt = b"".join(item.bytes or item.token.encode() for item in logprobs)
    raw = text.encode()
    offset = spelt.find(raw)
    if offset < 0:
        return None, {}
    fields: dict[str, float] = {}
    total = 0.0
    counted: set[int] = set()
    for span in value_spans(text, start):
        start = offset + len(text[: span.start].encode())
        end = offset + len(text[: span.end].encode())
        log = 0.0
        position = 0
        for number, item in enumerate(logprobs):
            after = position + len(item.bytes or item.token.encode())
            if position < end and after > start:
                log += item.logprob
                if number not in counted:
                    counted.add(number)
                    total += item.logprob
            position = after
        fields[span.path] = math.exp(min(0.0, log))
    return (math.exp(min(0.0, total)) if fields else None), fields
