"""Extraction of a JSON object from a model's text: bare, in a code fence, amid prose or other braces, or malformed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from qvl.errors import AnalysisError
from qvl.types import JsonObject

# Each one is tried from its start to the end, so that a text of nothing else would take its square.
MOST_OPENINGS: Final = 2000
# How far an object may be wrapped in others, in lists of one and in strings.
DEEPEST: Final = 8
_TAG: Final = "</think>"
_DECODER: Final = json.JSONDecoder()
Fits: TypeAlias = Callable[[JsonObject], bool]


@dataclass(frozen=True, slots=True)
class JsonMatch:
    """A JSON object, the position in the text where it starts, and `exact`: False if it had to be repaired."""

    value: JsonObject
    start: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class ValueMatch:
    """A JSON object or list, the position in the text where it starts, and `exact`, as of a JsonMatch."""

    value: object
    start: int
    exact: bool = True


def find_object(text: str, *, complete: bool, fits: Fits) -> JsonMatch:
    """Return the JSON object in `text`; of several, one for which `fits` is true, then the valid, largest or last one.

    Lists of one item, JSON strings, and objects around the only one that fits are unwrapped.
    `complete` False means that the answer was cut off by max_tokens; such text is never repaired.

    Raises:
        AnalysisError: `text` has no JSON object; `raw` keeps the text.
    """
    offset = _behind_thought(text)
    body = text[offset:]
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):
        if not complete:
            raise AnalysisError("the answer was cut off", raw=text, hint="raise max_tokens") from None
        candidates = list(_candidates(body))
    else:
        if isinstance(whole, str):
            return _within(whole, text, complete, fits)
        candidates = list(_objects(whole, max(body.find("{"), 0)))
    if not candidates:
        raise AnalysisError("the answer has no JSON object", raw=text)
    right = [item for item in candidates if fits(item.value)]
    if not right:
        # An object inside another one counts where the outer one does not fit.
        inner = [(item, _nested(item.value, fits)) for item in candidates]
        right = [_inside(objects[0], item, body) for item, objects in inner if len(objects) == 1]
    best = (right or candidates)[0]
    for item in (right or candidates)[1:]:
        if (item.exact, len(item.value)) >= (best.exact, len(best.value)):
            best = item
    return JsonMatch(best.value, best.start + offset, best.exact)


def find_values(text: str) -> list[ValueMatch]:
    """Return the objects and lists in `text` that are in no other, in order; of a broken list, what is whole in it.

    The text may be one JSON string that holds them.
    """
    offset = _behind_thought(text)
    body = text[offset:]
    if body.lstrip()[:1] == '"' and isinstance(whole := _loaded(body), str):
        return [ValueMatch(match.value, len(text), False) for match in find_values(whole)]
    matches: list[ValueMatch] = []
    at = 0
    for _ in range(MOST_OPENINGS):
        start = _opening(body, at)
        if start is None:
            break
        try:
            value, at = _DECODER.raw_decode(body, start)
        except (ValueError, RecursionError):
            at = start + 1
            if body[start] == "{" and (end := _end(body, start)) is not None:
                at = end
                matches.append(ValueMatch(_mended(body[start:end]), len(text), False))
        else:
            matches.append(ValueMatch(value, start + offset))
    return matches


def _behind_thought(text: str) -> int:
    """The position where the answer begins: after the last `</think>` that is not inside JSON."""
    at = text.rfind(_TAG)
    if at < 0 or _loaded(text) is not None:
        return 0
    if not text[at + len(_TAG) :].strip() and _loaded(text[:at]) is not None:
        return 0
    spans = list(_spans(text))
    while at >= 0:
        around = next((start for start, end in spans if start < at < end), None)
        if around is None:
            return at + len(_TAG)
        at = text.rfind(_TAG, 0, around)
    return 0


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """The start and the end of each JSON value in `text`."""
    at = 0
    for _ in range(MOST_OPENINGS):
        start = _opening(text, at)
        if start is None:
            return
        try:
            _, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
        else:
            yield start, at


def _opening(text: str, at: int) -> int | None:
    return min((start for sign in "{[" if (start := text.find(sign, at)) >= 0), default=None)


def _within(inner: str, text: str, complete: bool, fits: Fits) -> JsonMatch:
    """The object in `inner`, the content of a JSON string; its position is unknown, since `text` has it escaped."""
    try:
        match = find_object(inner, complete=complete, fits=fits)
    except AnalysisError as exc:
        exc.raw = text
        raise
    return JsonMatch(match.value, len(text), exact=False)


def _nested(value: JsonObject, fits: Fits, depth: int = 1) -> list[JsonObject]:
    """The outermost objects inside `value` that fit, except those that share a field name with an object around them.

    A shared name means a part of a malformed answer, not an answer inside a wrapper.
    """
    objects = []
    for item in map(_unwrapped, value.values()):
        if isinstance(item, dict):
            right = [item] if fits(item) else _nested(item, fits, depth + 1) if depth < DEEPEST else []
            objects += [one for one in right if len(value) == 1 or not one.keys() & value.keys()]
    return objects


def _inside(value: JsonObject, outer: JsonMatch, body: str) -> JsonMatch:
    """`value` with its position in `body`, searched inside `outer`; len(body) if its text is not found."""
    at = outer.start + 1
    for _ in range(MOST_OPENINGS if outer.exact else 0):
        at = body.find("{", at)
        if at < 0:
            break
        try:
            if _DECODER.raw_decode(body, at)[0] == value:
                return JsonMatch(value, at)
        except (ValueError, RecursionError):
            pass
        at += 1
    return JsonMatch(value, len(body), exact=False)


def _unwrapped(value: object) -> object:
    """The value inside lists of one item and strings that are JSON."""
    for _ in range(DEEPEST):
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        elif isinstance(value, str) and (inner := _loaded(value)) is not None:
            value = inner
        else:
            break
    return value


def _loaded(text: str) -> object:
    """The object, list or string that `text` is in JSON; None for anything else."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(value: object, start: int, exact: bool = True) -> Iterator[JsonMatch]:
    value = _unwrapped(value)
    if isinstance(value, dict):
        yield JsonMatch(value, start, exact)


def _candidates(body: str) -> Iterator[JsonMatch]:
    """Every top-level object in `body`, repaired if it is not valid JSON."""
    at = 0
    for _ in range(MOST_OPENINGS):
        start = _opening(body, at)
        if start is None:
            return
        try:
            value, at = _DECODER.raw_decode(body, start)
        except (ValueError, RecursionError):
            at = start + 1
            if body[start] == "{" and (end := _end(body, start)) is not None:
                at = end
                yield from _objects(_mended(body[start:end]), start, exact=False)
        else:
            yield from _objects(value, body.find("{", start))


def _end(body: str, start: int) -> int | None:
    """The position after the brace that closes the one at `start`, else after the last closing brace."""
    depth = 0
    for at in range(start, len(body)):
        depth += (body[at] == "{") - (body[at] == "}")
        if depth == 0:
            return at + 1
    last = body.rfind("}", start)
    return last + 1 if last > start else None


def _mended(text: str) -> object:
    import json_repair

    try:
        return json_repair.loads(text)
    except RecursionError:
        return None
