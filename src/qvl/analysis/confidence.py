"""The model's confidence in each value of a JSON answer, from the probabilities of its tokens."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Final

from qvl.types import TokenLogprob

CONFIDENCE_METHOD: Final = "token_probability_product"
CALIBRATED: Final = "calibrated"
"""The method of confidences that came through a calibration."""


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
    text: str,
    logprobs: Sequence[TokenLogprob] | None,
    start: int | None = None,
    *,
    wholes: Collection[str] = (),
    beside: Collection[str] = (),
) -> tuple[float | None, dict[str, float]]:
    """Return the confidence (0 to 1) in the answer `text`, and in each scalar by path (see `value_spans`).

    It is (None, {}) if `logprobs` do not spell `text`. A token that spells parts of two values counts for both. Quotes
    belong to their value, since the opening one decides between a string and null. Keys are not counted.

    Args:
        start: where the JSON object or list begins; None is the first object.
        wholes: paths of objects and lists that count as one value each, such as a box of four numbers.
        beside: paths among `wholes` that do not count for the confidence in the whole answer.
    """
    tokens = _tokens(text, logprobs)
    if logprobs is None or tokens is None:
        return None, {}
    spelling: dict[str, set[int]] = {}
    for span in value_spans(text, start):
        name = _whole(span.path, wholes)
        spelling.setdefault(name, set()).update(_between(tokens, text, span))
    counted = set().union(*(numbers for name, numbers in spelling.items() if name not in beside))
    fields = {name: _product(logprobs, numbers) for name, numbers in spelling.items()}
    return (_product(logprobs, counted) if counted else None), fields


def _whole(path: str, wholes: Collection[str]) -> str:
    """Return the one of `wholes` that the value at `path` is part of, else `path`."""
    steps = path.split(".") if wholes else ()
    return next((name for end in range(1, len(steps)) if (name := ".".join(steps[:end])) in wholes), path)


def _tokens(text: str, logprobs: Sequence[TokenLogprob] | None) -> list[int] | None:
    """Return the position in the UTF-8 of `text` where each token ends; None if the tokens do not spell `text`."""
    if not logprobs:
        return None
    pieces = [item.bytes or item.token.encode() for item in logprobs]
    offset = b"".join(pieces).find(text.encode())
    return None if offset < 0 else [end - offset for end in itertools.accumulate(map(len, pieces))]


def _between(ends: Sequence[int], text: str, span: _Span) -> range:
    """Return the numbers of the tokens that spell at least a part of `span`."""
    start, end = (len(text[:at].encode()) for at in (span.start, span.end))
    return range(bisect.bisect_right(ends, start), bisect.bisect_left(ends, end) + 1)


def _product(logprobs: Sequence[TokenLogprob], numbers: Iterable[int]) -> float:
    return math.exp(min(0.0, sum(logprobs[number].logprob for number in numbers)))
