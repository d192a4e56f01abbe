"""Makes a client's JSON schema ready for a grammar: bounded, closed, free of what no grammar enforces.

The result is a schema like any other; the local engine and vLLM compile it with the same compiler.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import RequestError

if TYPE_CHECKING:
    from qvl.types import ResponseFormat, Tool

MAX_SUBSCHEMAS: Final = 2_000
MAX_DEPTH: Final = 64
MAX_SCHEMA_CHARACTERS: Final = 256 * 1024
MAX_PATTERN: Final = 32 * 1024
MAX_CHOICES: Final = 4_096
MAX_CHOICE_CHARACTERS: Final = 128 * 1024
MAX_TOOLS: Final = 128
# JSON Schema calls a format an annotation unless it is known; these the compiler knows.
FORMATS: Final = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Checked once the answer is there, where anybody checks it: no grammar can count or compare what it has read.
CHECKED_AFTERWARDS: Final = frozenset(
    {
        *("uniqueItems", "contains", "minContains", "maxContains", "minProperties", "maxProperties", "propertyNames"),
        *("dependentRequired", "dependentSchemas", "not", "if", "then", "else"),
        *("unevaluatedProperties", "unevaluatedItems"),
    }
)
_DATA: Final = frozenset({"const", "enum", "default", "examples", "example", "required"})
_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_JOINS: Final = ("allOf", "anyOf", "oneOf")
_SAYS_OTHERWISE: Final = ("additionalProperties", "unevaluatedProperties", "patternProperties")

Schema = dict[str, Any]


def enforceable(schema: Any, param: str) -> Schema:
    """Return a copy of `schema` for the compiler: objects are closed unless they say otherwise, annotations gone.

    Raises:
        RequestError: it is too large to be compiled for one request, or not a schema.
    """
    if not isinstance(schema, Mapping):
        raise RequestError("the schema must be an object", param=param, code="invalid_schema")
    plain: Schema = _plain(schema, param, 0)
    _bound(plain, param)
    return _Closing(plain).closed()


def call_schema(tools: Sequence[Tool]) -> Schema:
    """Return the schema of one call of any of `tools`: an object of name and arguments.

    Each tool's parameters stand under a definition of their own, and their references are led there.

    Raises:
        RequestError: as `enforceable`; more than MAX_TOOLS tools.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools)} tools to choose from", hint=f"at most {MAX_TOOLS}", param="tools")
    definitions: Schema = {}
    calls: list[Schema] = []
    for number, tool in enumerate(tools):
        parameters = enforceable(tool.parameters or {"type": "object"}, "tools")
        definitions[f"t{number}"] = _moved(parameters, f"#/$defs/t{number}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/t{number}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    top = calls[0] if len(calls) == 1 else {"anyOf": calls}
    whole = {**top, "$defs": definitions}
    _bound(whole, "tools")
    return whole


def check_format(form: ResponseFormat) -> None:
    """Refuses a pattern or choices that are too large to be compiled for one request.

    Raises:
        RequestError: naming the bound.
    """
    if form.pattern is not None and len(form.pattern) > MAX_PATTERN:
        raise _too_large(f"a pattern of {len(form.pattern)} characters", f"at most {MAX_PATTERN}", "response_format")
    if len(form.choices) > MAX_CHOICES:
        raise _too_large(f"{len(form.choices)} choices", f"at most {MAX_CHOICES}", "response_format")
    if (characters := sum(map(len, form.choices))) > MAX_CHOICE_CHARACTERS:
        hint = f"at most {MAX_CHOICE_CHARACTERS} together"
        raise _too_large(f"choices of {characters} characters", hint, "response_format")


def without_what_is_checked_afterwards(schema: Schema) -> Schema:
    """Return `schema` without the assertions that no grammar enforces, for an answer that is validated in any case."""

    def drop(node: Schema) -> Schema:
        return {key: value for key, value in node.items() if key not in CHECKED_AFTERWARDS}

    made: Schema = _mapped(schema, drop)
    return made


def _too_large(what: str, hint: str, param: str) -> RequestError:
    return RequestError(f"{what} cannot be compiled for one request", hint=hint, param=param, code="invalid_schema")


def _plain(value: Any, param: str, depth: int) -> Any:
    """Mappings and tuples as dicts and lists, which is what the compiler takes."""
    if depth > 2 * MAX_DEPTH:
        raise _too_large(f"a schema deeper than {MAX_DEPTH} levels", "flatten it, or use $defs", param)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, param, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, param, depth + 1) for item in value]
    return value


def _bound(schema: Schema, param: str) -> None:
    try:
        characters = len(json.dumps(schema))
    except (TypeError, ValueError) as exc:
        raise RequestError(f"the schema cannot be read: {exc}", param=param, code="invalid_schema") from exc
    if characters > MAX_SCHEMA_CHARACTERS:
        raise _too_large(f"a schema of {characters} characters", f"at most {MAX_SCHEMA_CHARACTERS}", param)
    options = 0
    for count, (node, depth) in enumerate(_nodes(schema), start=1):
        if depth > MAX_DEPTH:
            raise _too_large(f"a schema deeper than {MAX_DEPTH} levels", "flatten it, or use $defs", param)
        if count > MAX_SUBSCHEMAS:
            raise _too_large(f"a schema of more than {MAX_SUBSCHEMAS} parts", "leave some out", param)
        if isinstance(values := node.get("enum"), list) and (options := options + len(values)) > MAX_CHOICES:
            raise _too_large(f"more than {MAX_CHOICES} enum values", "leave some out", param)


def _nodes(schema: Any, depth: int = 0) -> Iterator[tuple[Schema, int]]:
    """Every subschema with its depth; not what only looks like one inside of `const`, `enum` and the like."""
    if not isinstance(schema, dict):
        return
    yield schema, depth
    if depth > MAX_DEPTH:
        return
    for key, value in schema.items():
        if key in _DATA:
            continue
        if key in _MAPS and isinstance(value, dict):
            inner: Sequence[Any] = list(value.values())
        else:
            inner = value if isinstance(value, list) else [value]
        for item in inner:
            yield from _nodes(item, depth + 1)


def _mapped(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """A copy with `change` applied to every subschema, from the top down."""
    if not isinstance(schema, dict):
        return schema
    node = change(schema)
    made: Schema = {}
    for key, value in node.items():
        if key in _DATA:
            made[key] = value
        elif key in _MAPS and isinstance(value, dict):
            made[key] = {name: _mapped(inner, change) for name, inner in value.items()}
        elif isinstance(value, list):
            made[key] = [_mapped(inner, change) for inner in value]
        else:
            made[key] = _mapped(value, change)
    return made


def _moved(schema: Schema, root: str) -> Schema:
    """`schema` as it must be written where `root` points, since references count from the top of a document."""
    own = schema.get("$id")
    anchors = {node["$anchor"]: place for place, node in _places(schema, root) if isinstance(node.get("$anchor"), str)}

    def lead(node: Schema) -> Schema:
        node = {key: value for key, value in node.items() if key not in ("$id", "$anchor", "$schema")}
        reference = node.get("$ref")
        if not isinstance(reference, str):
            return node
        if isinstance(own, str) and own and reference.startswith(own):
            reference = reference.removeprefix(own) or "#"
        if reference == "#" or reference.startswith("#/"):
            node["$ref"] = root + reference[1:]
        elif reference.startswith("#") and reference[1:] in anchors:
            node["$ref"] = anchors[reference[1:]]
        return node

    moved: Schema = _mapped(schema, lead)
    return moved


def _places(schema: Any, place: str) -> Iterator[tuple[str, Schema]]:
    """Every object in `schema` with the pointer to it."""
    if isinstance(schema, dict):
        yield place, schema
        for key, value in schema.items():
            yield from _places(value, f"{place}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from _places(value, f"{place}/{number}")


class _Closing:
    """Closes the objects of one schema.

    What is joined (`allOf`, or properties beside a union or a reference) is closed as a whole, by the names of all its
    parts; a part that were closed by itself would forbid the others.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        # Definitions that are joined somewhere stay open where they stand.
        self._joined: set[int] = set()
        for node, _ in _nodes(root):
            if _is_join(node):
                for part in self._parts(node):
                    self._join(part)

    def closed(self) -> Schema:
        made: Schema = self._close(self._root, joined=False)
        return made

    def _join(self, part: Any) -> None:
        target = self._target(part)
        if target is None or id(target) in self._joined:
            return
        self._joined.add(id(target))
        for inner in self._parts(target):
            self._join(inner)

    def _parts(self, node: Schema) -> list[Any]:
        parts: list[Any] = [{"$ref": node["$ref"]}] if "$ref" in node else []
        for key in _JOINS:
            parts += node[key] if isinstance(node.get(key), list) else []
        return parts

    def _target(self, part: Any) -> Schema | None:
        """The subschema that `part` is or refers to."""
        for _ in range(MAX_DEPTH):
            if not isinstance(part, dict):
                return None
            reference = part.get("$ref")
            if reference is None or len(part) > 1:
                return part
            part = self._resolved(reference)
        return None

    def _resolved(self, reference: Any) -> Any:
        from urllib.parse import unquote

        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        found: Any = self._root
        for step in unquote(reference[1:]).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                return None
        return found

    def _names(self, node: Any, seen: frozenset[int]) -> set[str] | None:
        """The names that a join declares in all its parts; None where one of them is open."""
        if not isinstance(node, dict) or id(node) in seen:
            return set()
        if any(key in node for key in _SAYS_OTHERWISE):
            return None
        names = set(node["properties"]) if isinstance(node.get("properties"), dict) else set()
        names |= _required(node)
        for part in self._parts(node):
            inner = self._names(self._resolved(part["$ref"]) if set(part) == {"$ref"} else part, seen | {id(node)})
            if inner is None:
                return None
            names |= inner
        return names

    def _close(self, node: Any, *, joined: bool) -> Any:
        if not isinstance(node, dict):
            return node
        joined = joined or id(node) in self._joined
        made: Schema = {}
        for key, value in node.items():
            if key == "uniqueItems" or (key == "format" and value not in FORMATS):
                continue
            if key in _DATA:
                made[key] = value
            elif key in _MAPS and isinstance(value, dict):
                made[key] = {name: self._close(inner, joined=False) for name, inner in value.items()}
            elif isinstance(value, list):
                part = key in _JOINS and (joined or _is_join(node))
                made[key] = [self._close(inner, joined=part) for inner in value]
            else:
                made[key] = self._close(value, joined=False)
        if joined or any(key in node for key in _SAYS_OTHERWISE):
            return made
        if _is_join(node):
            names = self._names(node, frozenset())
        else:
            names = set(node["properties"]) | _required(node) if isinstance(node.get("properties"), dict) else None
        if names:
            declared = node["properties"] if isinstance(node.get("properties"), dict) else {}
            made["properties"] = {**made.get("properties", {}), **{name: {} for name in sorted(names - set(declared))}}
            made["additionalProperties"] = False
        return made


def _required(node: Schema) -> set[str]:
    names = node.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _is_join(node: Schema) -> bool:
    """True if several subschemas describe one object together."""
    parts = node.get("allOf")
    if isinstance(parts, list) and (len(parts) > 1 or "properties" in node or "$ref" in node):
        return True
    return "properties" in node and any(key in node for key in (*_JOINS, "$ref"))


def compiler_reason(message: str) -> str:
    """Return what the grammar compiler said as one line; of a pattern, what is wrong with it and where."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    for number, line in enumerate(lines[1:], start=1):
        if re.fullmatch(r" +\^+", line):
            # The compiler shows the pattern indented by four, and carets below what it stumbled over.
            pattern, at = lines[number - 1][4:], line.index("^") - 4
            what = next((one.removeprefix("error: ") for one in lines[number:] if one.startswith("error: ")), "")
            near = pattern[max(0, at - 12) : at + 24]
            return f"invalid pattern: {what or 'it cannot be read'}, at character {at + 1}, near {near!r}"
    return lines[0] if lines else "it cannot be read"
