"""Limits on schemas, patterns and choices to compile for one request, since they come from untrusted clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from qvl.errors import RequestError

if TYPE_CHECKING:
    from qvl.types import JsonMapping, JsonObject, ResponseFormat

MAX_SUBSCHEMAS: Final = 2_000
MAX_DEPTH: Final = 64
MAX_SCHEMA_CHARACTERS: Final = 256 * 1024
MAX_PATTERN: Final = 32 * 1024
MAX_CHOICES: Final = 4_096
MAX_CHOICE_CHARACTERS: Final = 128 * 1024
MAX_TOOLS: Final = 128
# The compiler counts a multiple's remainders one by one, and writes out every form that an allOf can take.
MAX_MULTIPLE: Final = 10_000
MAX_FORMS: Final = 64
DATA: Final = frozenset({"const", "enum", "default", "examples", "example", "required"})
MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def check_format(form: ResponseFormat) -> None:
    """Check a pattern or choices against the limits.

    Raises:
        RequestError: they are too large; the message names the limit.
    """
    if form.pattern is not None and len(form.pattern) > MAX_PATTERN:
        raise too_large(f"a pattern of {len(form.pattern)} characters", f"at most {MAX_PATTERN}", "response_format")
    if len(form.choices) > MAX_CHOICES:
        raise too_large(f"{len(form.choices)} choices", f"at most {MAX_CHOICES}", "response_format")
    if any("\ud800" <= char <= "\udfff" for text in (form.pattern or "", *form.choices) for char in text):
        what = f"the {form.kind} contains half a surrogate pair, which is not supported"
        raise RequestError(what, hint="leave it out", param="response_format", code="invalid_schema")
    if (characters := sum(map(len, form.choices))) > MAX_CHOICE_CHARACTERS:
        hint = f"at most {MAX_CHOICE_CHARACTERS} together"
        raise too_large(f"choices of {characters} characters", hint, "response_format")


def too_large(what: str, hint: str, param: str) -> RequestError:
    return RequestError(f"{what} cannot be compiled for one request", hint=hint, param=param, code="invalid_schema")


def plain(schema: JsonMapping, param: str, depth: int = 0) -> JsonObject:
    """Return a copy of `schema` with dicts and lists for mappings and tuples, for the compiler; errors name `param`."""
    return {str(key): _plain(item, param, depth + 1) for key, item in schema.items()}


def _plain(value: object, param: str, depth: int) -> object:
    if depth > 2 * MAX_DEPTH:
        raise too_large(f"a schema deeper than {MAX_DEPTH} levels", "flatten it, or use $defs", param)
    if isinstance(value, Mapping):
        return plain(value, param, depth)
    if isinstance(value, list | tuple):
        return [_plain(item, param, depth + 1) for item in value]
    return value


def bound(schema: JsonObject, param: str, *, validated: bool = False) -> None:
    """Check a schema against the limits.

    `validated`: the answer is validated against the schema afterwards, so multipleOf has no limit.

    Raises:
        RequestError: it is too large; the message names the limit.
    """
    try:
        characters = len(json.dumps(schema))
    except (TypeError, ValueError) as exc:
        raise RequestError(f"the schema is not valid JSON: {exc}", param=param, code="invalid_schema") from exc
    if characters > MAX_SCHEMA_CHARACTERS:
        raise too_large(f"a schema of {characters} characters", f"at most {MAX_SCHEMA_CHARACTERS}", param)
    options = multiples = 0
    for count, (node, depth) in enumerate(_nodes(schema), start=1):
        if depth > MAX_DEPTH:
            raise too_large(f"a schema deeper than {MAX_DEPTH} levels", "flatten it, or use $defs", param)
        if count > MAX_SUBSCHEMAS:
            raise too_large(f"a schema of more than {MAX_SUBSCHEMAS} parts", "leave some out", param)
        if isinstance(values := node.get("enum"), list) and (options := options + len(values)) > MAX_CHOICES:
            raise too_large(f"more than {MAX_CHOICES} enum values", "leave some out", param)
        if not validated and (multiples := multiples + multiple(node) - 1) >= MAX_MULTIPLE:
            raise too_large("so large multipleOf values", f"at most {MAX_MULTIPLE} in sum; leave one out", param)


def multiple(node: JsonObject) -> int:
    """Return the node's multipleOf with its decimal point removed, its cost in the compiler; 1 without multipleOf."""
    step = node.get("multipleOf")
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        return 1
    if isinstance(step, int) and abs(step) > 10**18:
        return MAX_MULTIPLE + 1
    digits = "".join(map(str, Decimal(repr(step)).as_tuple().digits)).strip("0")
    return int(digits or 1)


def without_large_multiples(schema: JsonObject) -> JsonObject:
    """Return `schema` without values of multipleOf that exceed the limit of `bound`."""
    budget = MAX_MULTIPLE

    def drop(node: JsonObject) -> JsonObject:
        nonlocal budget
        if (cost := multiple(node) - 1) < budget:
            budget -= cost
            return node
        return {key: value for key, value in node.items() if key != "multipleOf"}

    return mapped(schema, drop)


def _nodes(schema: object, depth: int = 0) -> Iterator[tuple[JsonObject, int]]:
    """Yield (subschema, depth) of every subschema; values of `const`, `enum` and the like are not subschemas."""
    if not isinstance(schema, dict):
        return
    yield schema, depth
    if depth > MAX_DEPTH:
        return
    for key, value in schema.items():
        if key in DATA:
            continue
        if key in MAPS and isinstance(value, dict):
            inner = list(value.values())
        else:
            inner = value if isinstance(value, list) else [value]
        for item in inner:
            yield from _nodes(item, depth + 1)


def at_pointer(root: object, pointer: str) -> object:
    """Return what the JSON pointer `/$defs/A` (or `#/$defs/A`) leads to in `root`; None if nothing is there."""
    node = root
    for step in pointer.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(name)
        elif isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node


def mapped(schema: JsonObject, change: Callable[[JsonObject], JsonObject]) -> JsonObject:
    """Return a copy of `schema` with `change` applied to it and every subschema, from the top down."""

    def inside(value: object) -> object:
        return mapped(value, change) if isinstance(value, dict) else value

    node = change(schema)
    made: JsonObject = {}
    for key, value in node.items():
        if key in DATA:
            made[key] = value
        elif key in MAPS and isinstance(value, dict):
            made[key] = {name: inside(inner) for name, inner in value.items()}
        elif isinstance(value, list):
            made[key] = [inside(inner) for inner in value]
        else:
            made[key] = inside(value)
    return made
