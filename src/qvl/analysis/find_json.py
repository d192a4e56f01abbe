"""The JSON object in what a model wrote: alone, in a fence, between other text and other braces, or not quite JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from qvl.errors import AnalysisError

# Each one is tried from its place to the end, so that a text of nothing else would take its square.
MOST_OPENINGS: Final = 2000
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class JsonMatch:
    """An object, where its text begins, and whether it was JSON as it stood."""

    value: dict[str, Any]
    start: int
    exact: bool = True


def find_object(text: str, *, complete: bool, fits: Callable[[dict[str, Any]], bool]) -> JsonMatch:
    """The object in `text`: of several the one that `fits`, the fullest and the last of those; a list of one is it too.

    `complete` False says that the answer was cut off by max_tokens; such text is never repaired.

    Raises:
        AnalysisError: there is none; `raw` keeps the text.
    """
    offset = text.rfind("</think>")
    offset = 0 if offset < 0 else offset + len("</think>")
    body = text[offset:]
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):
        if not complete:
            raise AnalysisError("the answer was cut off", raw=text, hint="raise max_tokens") from None
        candidates = list(_candidates(body))
    else:
        candidates = list(_objects(whole, max(body.find("{"), 0)))
    if not candidates:
        raise AnalysisError("the answer is no JSON object", raw=text)
    # An object in one of another name is looked at where the outer one is not what was asked for.
    inner = [
        JsonMatch(value, item.start + body[item.start :].find("{", 1), item.exact)
        for item in candidates
        if len(item.value) == 1 and isinstance(value := next(iter(item.value.values())), dict)
    ]
    right = [item for item in candidates if fits(item.value)] or [item for item in inner if fits(item.value)]
    best = (right or candidates)[0]
    for item in (right or candidates)[1:]:
        if (item.exact, len(item.value)) >= (best.exact, len(best.value)):
            best = item
    return JsonMatch(best.value, best.start + offset, best.exact)


def _objects(value: Any, start: int, exact: bool = True) -> Iterator[JsonMatch]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        yield JsonMatch(value, start, exact)


def _candidates(body: str) -> Iterator[JsonMatch]:
    """Every object that stands in `body` by itself, mended where it is not JSON."""
    at = 0
    for _ in range(MOST_OPENINGS):
        starts = [place for sign in "{[" if (place := body.find(sign, at)) >= 0]
        if not starts:
            return
        start = min(starts)
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
    """Behind the brace that closes the one at `start`, or behind the last one there is."""
    depth = 0
    for place in range(start, len(body)):
        depth += (body[place] == "{") - (body[place] == "}")
        if depth == 0:
            return place + 1
    last = body.rfind("}", start)
    return last + 1 if last > start else None


def _mended(text: str) -> Any:
    import json_repair

    try:
        return json_repair.loads(text)
    except RecursionError:
        return None
