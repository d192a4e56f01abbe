"""Abstention: which answers are too unsure to be told, and an answer without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote

from qvl.backends.schema_bounds import at_pointer
from qvl.errors import ConfigError
from qvl.evidence.answer_form import form_of
from qvl.suggest import nearest
from qvl.types import JsonMapping, JsonObject

BELOW: Final = "below_threshold"
UNKNOWN: Final = "not_calibrated"
_DEEPEST: Final = 32
AbstainLike: TypeAlias = "float | Mapping[str, float] | Thresholds"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The least confidence at which an answer is told: of every field and question (`every`), or of named ones."""

    every: float | None = None
    named: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float | None:
        """Return the least confidence of the field or question `name`; None if it is told in any case."""
        return self.named.get(name, self.every)

    def reason(self, name: str, confidence: float | None) -> str | None:
        """Return why an answer of `confidence` (None: not calibrated) is not told; None if it is told."""
        least = self.of(name)
        return None if least is None else reason_for(confidence, least)


def reason_for(confidence: float | None, least: float) -> str | None:
    """Return why an answer of `confidence` (None: not calibrated) is not told at `least`; None if it is told."""
    if confidence is None:
        return UNKNOWN
    return BELOW if confidence < least else None


def read_abstain(value: AbstainLike | None, known: Iterable[str] | None = None) -> Thresholds | None:
    """Return `abstain=` as Thresholds: a number for all, or one for each named field or question.

    Args:
        known: the names that there are; None leaves them unchecked.

    Raises:
        ConfigError: no number from 0 to 1, or an unknown name.
    """
    if value is None or isinstance(value, Thresholds):
        found = value
    elif isinstance(value, Mapping):
        found = Thresholds(None, {str(name): _share(least, f"abstain[{name!r}]") for name, least in value.items()})
    else:
        found = Thresholds(_share(value, "abstain"))
    if found is not None and known is not None:
        names = set(known)
        for name in found.named:
            if name not in names:
                what = f"abstain: the calibration has no field or question {name!r}"
                raise ConfigError(what, hint=nearest(name, names), param="abstain")
    return found


def _share(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{what}={value!r} is not a confidence", hint="a number from 0 to 1", param="abstain")
    return float(value)


Emptied: TypeAlias = Literal["null", "left out"]


def how_emptied(schema: JsonMapping, name: str) -> Emptied | None:
    """Return how a schema allows the field `name` to be without a value; None if it does not, or has no such field.

    A field that may be null becomes null; an entry of a free mapping is left out.
    """
    parts = name.split(".")
    found: list[tuple[object, bool]] = [(schema, False)]
    for part in parts:
        found = [step for inner, _ in found for step in _steps(inner, part, schema)]
    if any(_takes_null(inner, schema) for inner, _ in found):
        return "null"
    return "left out" if found and all(free for _, free in found) else None


def has_field(schema: JsonMapping, name: str) -> bool:
    """Return whether a value of `schema` may have the field `name`."""
    found: list[object] = [schema]
    for part in name.split("."):
        found = [step for inner in found for step, _ in _steps(inner, part, schema)]
    return bool(found)


def leaf_names(schema: JsonMapping) -> list[str]:
    """Return the name of every scalar, box and point that a schema names, `*` for a place in a list."""
    found: dict[str, None] = {}

    def walk(node: object, name: str, above: tuple[int, ...]) -> None:
        for option in _options(node, schema):
            if not isinstance(option, Mapping) or id(option) in above or len(above) > _DEEPEST:
                continue
            if form_of(option):
                found[name] = None
                continue
            inner = {str(part): below for part, below in (option.get("properties") or {}).items()}
            if isinstance(option.get("items"), Mapping):
                inner["*"] = option["items"]
            if not inner and name and option.get("type") not in ("object", "array", "null"):
                found[name] = None
            for part, below in inner.items():
                walk(below, f"{name}.{part}" if name else part, (*above, id(option)))

    walk(schema, "", ())
    return list(found)


def _options(schema: object, top: JsonMapping, depth: int = 0) -> list[JsonMapping | bool]:
    """Return the schemas that a value may follow: references and alternatives resolved."""
    if isinstance(schema, bool):
        return [schema]
    if not isinstance(schema, Mapping) or depth > 32:
        return []
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        return _options(at_pointer(top, unquote(reference)), top, depth + 1)
    found: list[JsonMapping | bool] = []
    for word in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(word) or ():
            found += _options(inner, top, depth + 1)
    return found or [schema]


def _steps(schema: object, part: str, top: JsonMapping) -> list[tuple[object, bool]]:
    """Return (schema, whether it is an entry of a free mapping) of what lies at `part` in a value of `schema`."""
    found: list[tuple[object, bool]] = []
    for option in _options(schema, top):
        if option is True or option == {}:
            found.append((True, True))
        if not isinstance(option, Mapping):
            continue
        if part == "*" and "items" in option:
            found.append((option["items"], False))
        elif part in (properties := option.get("properties") or {}):
            found.append((properties[part], False))
        elif (more := option.get("additionalProperties")) and (isinstance(more, Mapping) or more is True):
            found.append((more, True))
        elif option.get("type") == "object" and not properties and "additionalProperties" not in option:
            found.append((True, True))
    return found


def _takes_null(schema: object, top: JsonMapping) -> bool:
    for option in _options(schema, top):
        if not isinstance(option, Mapping):
            return option is True
        kinds = option.get("type")
        if kinds == "null" or (isinstance(kinds, list) and "null" in kinds) or not option:
            return True
        if None in (option.get("enum") or ()) or ("const" in option and option["const"] is None):
            return True
    return False


def without(data: JsonMapping, paths: Mapping[str, Emptied]) -> JsonObject:
    """Return a copy of the answer `data` in which what lies at each path is null or left out."""
    changed = copy.deepcopy(dict(data))
    for path, how in paths.items():
        _empty(changed, path.split("."), how)
    return changed


def _empty(data: object, parts: list[str], how: Emptied) -> None:
    if isinstance(data, list):
        place = int(parts[0])
        if len(parts) > 1:
            _empty(data[place], parts[1:], how)
        else:
            data[place] = None
        return
    assert isinstance(data, dict)
    # A key may have dots itself, and then stand beside the shorter one.
    count = next(count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in data)
    key = ".".join(parts[:count])
    if count < len(parts):
        _empty(data[key], parts[count:], how)
    elif how == "null":
        data[key] = None
    else:
        del data[key]
