"""Texts and numbers of JSON as expressions of xgrammar's EBNF, which hold them to lengths, formats and bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from qvl.errors import RequestError, UnsupportedInputError

if TYPE_CHECKING:
    from qvl.types import JsonObject

# Digits of a number without a bound: no number of a model's needs more, and none shall go on for ever.
MAX_DIGITS: Final = 17
_WHOLE: Final = f'("0" | [1-9] [0-9]{{0,{MAX_DIGITS - 1}}})'
_FRACTION: Final = f'("." [0-9]{{1,{MAX_DIGITS}}})?'
NUMBER: Final = f'"-"? {_WHOLE} {_FRACTION} ([eE] [-+]? [0-9]{{1,2}})?'
CHARACTER: Final = r'([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))'

_DAYS: Final = '("0" [1-9] | [12] [0-9]'
_DATE: Final = (
    f'[0-9]{{4}} "-" (("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" {_DAYS} | "3" [01])'
    f' | ("04" | "06" | "09" | "11") "-" {_DAYS} | "30") | "02-" {_DAYS}))'
)
_CLOCK: Final = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME: Final = f'{_CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,9}})? ("Z" | [-+] {_CLOCK})'
_LABEL: Final = "[a-zA-Z0-9] ([-a-zA-Z0-9]{0,30} [a-zA-Z0-9])?"
_HOST: Final = f'{_LABEL} ("." {_LABEL}){{0,7}}'
_OCTET: Final = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9])'
_HEX: Final = "[0-9a-fA-F]"
_COUNT: Final = "[0-9]{1,9}"
_SEGMENT: Final = "[-a-zA-Z0-9._~!$&()*+,;=:@]*"
FORMATS: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "duration": f'"P" ({_COUNT} "W" | {_COUNT} [YMD] | "T" {_COUNT} [HMS] | {_COUNT} "DT" {_COUNT} [HMS])',
    "email": f'[a-zA-Z0-9_+] ([-a-zA-Z0-9._+]{{0,62}} [a-zA-Z0-9_+])? "@" {_HOST}',
    "hostname": _HOST,
    "ipv4": f'{_OCTET} ("." {_OCTET}){{3}}',
    "ipv6": f'{_HEX}{{1,4}} (":" {_HEX}{{1,4}}){{7}}',
    "uuid": f'{_HEX}{{8}} ("-" {_HEX}{{4}}){{3}} "-" {_HEX}{{12}}',
    "uri": f'[a-zA-Z] [-a-zA-Z0-9+.]{{0,15}} "://" {_HOST} (":" [1-9] [0-9]{{0,3}})? ("/" {_SEGMENT})*',
}


def lacks(what: str, param: str) -> UnsupportedInputError:
    """Return the refusal of what a schema asserts and the grammar does not say."""
    return UnsupportedInputError(
        f"openvino does not enforce {what} in a schema", hint="leave it out, or use local:", param=param
    )


def empty(what: str, param: str) -> RequestError:
    """Return the refusal of a schema that no value fits."""
    return RequestError(f"nothing fits the schema: {what}", param=param, code="invalid_schema")


def string(node: JsonObject, param: str) -> str:
    """Return the expression of a text in its quotes.

    Raises:
        UnsupportedInputError: it must match a pattern, or have a format and a length.
    """
    if "pattern" in node:
        raise lacks("pattern", param)
    least, most, form = node.get("minLength", 0), node.get("maxLength"), node.get("format")
    if form in FORMATS:
        if least or most is not None:
            raise lacks("format together with a length", param)
        return f'"\\"" {FORMATS[form]} "\\""'
    if most is not None and least > most:
        raise empty(f"a text of {least} to {most} characters", param)
    bounds = "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
    return f'"\\"" {CHARACTER}{bounds} "\\""' if most != 0 else '"\\"\\""'


def integer(node: JsonObject, param: str) -> str:
    """Return the expression of a whole number within the bounds of `node`.

    Raises:
        RequestError: no number is within them.
    """
    least, most = _bounds(node)
    if least is None and most is None:
        return f'"-"? {_WHOLE}'
    low = None if least is None else math.floor(least[0]) + 1 if least[1] else math.ceil(least[0])
    high = None if most is None else math.ceil(most[0]) - 1 if most[1] else math.floor(most[0])
    far = 10**MAX_DIGITS - 1
    low = min(-far, high or 0) if low is None else low
    high = max(far, low) if high is None else high
    if low > high:
        raise empty(f"a whole number from {low} to {high}", param)
    parts = [f'"-" ({_whole(max(1, -high), -low)})'] if low < 0 else []
    parts += [_whole(max(0, low), high)] if high >= 0 else []
    return f"({' | '.join(parts)})"


def number(node: JsonObject, param: str) -> str:
    """Return the expression of a number within the bounds of `node`, which must be whole.

    Raises:
        UnsupportedInputError: a bound is not whole.
        RequestError: no number is within them.
    """
    least, most = _bounds(node)
    if least is None and most is None:
        return NUMBER
    for bound in (least, most):
        if bound is not None and bound[0] != int(bound[0]):
            raise lacks(f"a bound of {bound[0]} of a number", param)
    if least is not None and most is not None and (least[0], least[1] or most[1]) > (most[0], False):
        raise empty(f"a number from {least[0]} to {most[0]}", param)
    parts = []
    if least is None or least[0] < 0:
        # The same, mirrored: from nothing, or the upper bound, down to the lower one.
        start = (-most[0], most[1]) if most is not None and most[0] <= 0 else (0, False)
        parts.append(f'"-" ({_number(start, None if least is None else (-least[0], least[1]))})')
    if most is None or (most[0] >= 0 and most != (0, True)):
        start = least if least is not None and least[0] >= 0 else (0, False)
        parts.append(_number(start, most))
    return f"({' | '.join(parts)})"


def _bounds(node: JsonObject) -> tuple[tuple[float, bool] | None, tuple[float, bool] | None]:
    """Return the tighter lower and upper bound, each with True where it is itself excluded."""
    lower = [(node["minimum"], False)] if "minimum" in node else []
    upper = [(node["maximum"], False)] if "maximum" in node else []
    for name, bounds in (("exclusiveMinimum", lower), ("exclusiveMaximum", upper)):
        if isinstance(node.get(name), bool):
            bounds[:] = [(value, bool(node[name])) for value, _ in bounds]  # draft 4
        elif name in node:
            bounds.append((node[name], True))
    return max(lower, default=None), min(upper, key=lambda bound: (bound[0], not bound[1]), default=None)


def _number(start: tuple[float, bool], end: tuple[float, bool] | None) -> str:
    """Return the expression of a number from `start`, 0 or more, to `end`; True excludes the bound itself."""
    low, high = int(start[0]), None if end is None else int(end[0])
    parts = []
    if start[1] and (high is None or low < high):
        parts.append(f'"{low}." "0"{{0,{MAX_DIGITS}}} [1-9] [0-9]{{0,{MAX_DIGITS}}}')
    first, last = low + start[1], max(low + 1, 10**MAX_DIGITS - 1) if high is None else high - 1
    if first <= last:
        parts.append(f"({_whole(first, last)}) {_FRACTION}")
    if high is not None and end is not None and not end[1]:
        parts.append(f'"{high}" ("." "0"{{1,3}})?')
    return " | ".join(parts)


def _whole(low: int, high: int) -> str:
    """Return the expression of a whole number from `low` to `high`, 0 or more, written without leading zeros."""
    parts: list[str] = []
    for size in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (size - 1) if size > 1 else 0)
        parts += _digits(str(first), str(min(high, 10**size - 1)))
    return " | ".join(parts)


def _digits(low: str, high: str) -> Iterator[str]:
    """Yield the alternatives of the numbers from `low` to `high`, which have as many digits."""
    rest = len(low) - 1
    if low == "0" * len(low) and high == "9" * len(high):
        yield f"[0-9]{{{len(low)}}}"
    elif not rest:
        yield f"[{low}-{high}]"
    elif low[0] == high[0]:
        yield from (f'"{low[0]}" {inner}' for inner in _digits(low[1:], high[1:]))
    else:
        first, last = int(low[0]), int(high[0])
        if low[1:] != "0" * rest:
            yield from (f'"{first}" {inner}' for inner in _digits(low[1:], "9" * rest))
            first += 1
        ended = high[1:] == "9" * rest
        if first <= last - (not ended):
            yield f"[{first}-{last - (not ended)}] [0-9]{{{rest}}}"
        if not ended:
            yield from (f'"{last}" {inner}' for inner in _digits("0" * rest, high[1:]))
