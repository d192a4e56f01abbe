"""Makes a client's JSON schema ready for a grammar: bounded, closed, free of what no grammar enforces.

The result is a schema like any other; the local engine and vLLM compile it with the same compiler.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urldefrag, urljoin

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
MAX_STEPS: Final = 100_000
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
_ONE: Final = frozenset(
    {"items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
_MANY: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SAME_VALUE: Final = frozenset({"allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "$ref"})
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
    reader = _SchemaRewriter(plain, "#", param)
    whole = reader.root()
    if reader.opened:
        whole["$defs"] = {**whole.get("$defs", {}), **reader.opened}
    return whole


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
        parameters: Schema = _plain(tool.parameters or {"type": "object"}, "tools", 0)
        _bound(parameters, "tools")
        reader = _SchemaRewriter(parameters, f"#/$defs/t{number}", "tools")
        definitions[f"t{number}"] = reader.root()
        definitions |= reader.opened
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


class _SchemaRewriter:
    """Rewrites one schema that will stand at `place` of the whole.

    `opened` are copies of definitions that an allOf composes: there an object may hold the names of the other branches.
    """

    def __init__(self, schema: Mapping[str, Any], place: str, param: str) -> None:
        self._schema = schema
        self._place = place
        self._param = param
        self._pointers: dict[str, str] = {}
        self._steps = MAX_STEPS
        self.opened: dict[str, Any] = {}
        self._index(schema, "", "")

    def root(self) -> dict[str, Any]:
        try:
            written: Schema = self._write(self._schema, "", closed=True)
        except RecursionError:
            raise _too_large("a schema whose references follow each other so far", "flatten it", self._param) from None
        return written

    def _index(self, node: Any, pointer: str, base: str) -> None:
        """Notes where `$id` and `$anchor` name a place."""
        if not isinstance(node, Mapping):
            return
        if isinstance(node.get("$id"), str):
            base = urljoin(base, node["$id"])
            self._pointers[urldefrag(base)[0]] = pointer
        for word in ("$anchor", "$dynamicAnchor"):
            if isinstance(node.get(word), str):
                self._pointers[f"{urldefrag(base)[0]}#{node[word]}"] = pointer
        for path, inner in _parts(node):
            self._index(inner, f"{pointer}/{path}", base)

    def _resolve(self, ref: Any, base: str) -> str:
        """The pointer, within the schema, that a reference means."""
        whole, fragment = urldefrag(urljoin(base, str(ref)) if base else str(ref))
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            found = self._pointers.get(f"{whole}#{fragment}")
        else:
            root = self._pointers.get(whole, None if whole else "")
            found = None if root is None else root + fragment
        if found is None or self._at(found) is None:
            raise RequestError(
                f"the schema refers to {str(ref)[:80]!r}, which is not in it",
                hint="references stay within the schema, such as #/$defs/Name",
                param=self._param,
                code="invalid_schema",
            )
        return found

    def _at(self, pointer: str) -> Any:
        node: Any = self._schema
        for step in pointer.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping):
                node = node.get(name)
            elif isinstance(node, (list, tuple)) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            else:
                return None
        return node

    def _base(self, pointer: str) -> str:
        """The `$id` that holds at a place."""
        base, steps = "", pointer.split("/")
        for size in range(1, len(steps) + 1):
            node = self._at("/".join(steps[:size]))
            if isinstance(node, Mapping) and isinstance(node.get("$id"), str):
                base = urljoin(base, node["$id"])
        return base

    def _write(self, node: Any, pointer: str, *, closed: bool) -> Any:
        """`node` anew; `closed` False leaves the names of this object open, for what is composed with it."""
        if not isinstance(node, Mapping):
            return node
        several = any(word in node for word in _SAME_VALUE)
        # One reference, or one of several forms, and nothing beside it: each form is an object of its own.
        apart = "allOf" not in node and not any(
            word in node for word in ("properties", "if", "dependentSchemas", "required", *_SAYS_OTHERWISE)
        )
        apart = apart and sum(word in node for word in ("$ref", "anyOf", "oneOf")) <= 1
        written: dict[str, Any] = {}
        for keyword, value in node.items():
            if keyword in ("$id", "$anchor", "$dynamicAnchor") or keyword == "uniqueItems":
                continue
            if keyword == "format" and value not in FORMATS:
                continue
            here = f"{pointer}/{keyword}"
            within = closed and apart if keyword in _SAME_VALUE else keyword != "not"
            if keyword == "$ref":
                written[keyword] = self._reference(self._resolve(value, self._base(pointer)), closed=within)
            elif keyword in _ONE and not isinstance(value, (list, tuple)):
                written[keyword] = self._write(value, here, closed=within)
            elif (keyword in _MANY or keyword == "items") and isinstance(value, (list, tuple)):
                written[keyword] = [
                    self._write(inner, f"{here}/{place}", closed=within) for place, inner in enumerate(value)
                ]
            elif keyword in _NAMED and isinstance(value, Mapping):
                written[keyword] = {
                    name: self._write(inner, f"{here}/{_escape(name)}", closed=within) for name, inner in value.items()
                }
            else:
                written[keyword] = value
        if closed and not (several and apart):
            self._close(node, pointer, written)
        return written

    def _close(self, node: Mapping[str, Any], pointer: str, written: dict[str, Any]) -> None:
        names: dict[str, Any] = {}
        if not self._names(node, pointer, names, set()) or not names:
            return
        declared = node.get("properties")
        if not any(word in node for word in _SAME_VALUE) and not isinstance(declared, dict):
            return  # only required: any other name is as welcome
        if any(word in node for word in _SAME_VALUE):
            # A branch of its own that knows all names: closing each branch would forbid the names of the others.
            written["allOf"] = [
                *written.get("allOf", ()),
                {"properties": dict.fromkeys(names, True), "additionalProperties": False},
            ]
        else:
            written["properties"] = {
                **written["properties"],
                **{name: True for name in names if name not in written["properties"]},
            }
            written["additionalProperties"] = False

    def _names(self, node: Any, pointer: str, names: dict[str, Any], seen: set[str]) -> bool:
        """Collects the names that this object declares in all its branches; False where one welcomes others."""
        if not isinstance(node, Mapping) or pointer in seen:
            return True
        seen.add(pointer)
        names.update(dict.fromkeys(_required(node)))
        self._steps -= 1 + len(names)
        if self._steps < 0:
            raise _too_large("a schema that composes so many names", "leave some out", self._param)
        if any(word in node and node[word] is not False for word in _SAYS_OTHERWISE):
            return False
        if isinstance(node.get("properties"), Mapping):
            names.update(dict.fromkeys(node["properties"]))
        if "$ref" in node:
            target = self._resolve(node["$ref"], self._base(pointer))
            if not self._names(self._at(target), target, names, seen):
                return False
        return all(
            self._names(inner, f"{pointer}/{path}", names, seen)
            for path, inner in _parts(node)
            if path.partition("/")[0] in _SAME_VALUE
        )

    def _reference(self, pointer: str, *, closed: bool) -> str:
        if closed:
            return self._place + _fragment(pointer)
        name = f"open{self._place[1:]}{pointer}".replace("/", ".").replace("~", "-")
        if name not in self.opened:
            self.opened[name] = {}  # before the definition is read, which may refer to itself
            self.opened[name] = self._write(self._at(pointer), pointer, closed=False)
        return f"#/$defs/{_fragment(name)}"


def _fragment(pointer: str) -> str:
    """A pointer in the letters that a reference may have."""
    return quote(pointer, safe="/~$")


def _escape(name: str) -> str:
    """A name as a step of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def _parts(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside `node`, with the pointer from it to them."""
    for keyword, value in node.items():
        if keyword in _NAMED and isinstance(value, Mapping):
            yield from ((f"{keyword}/{_escape(name)}", inner) for name, inner in value.items())
        elif (keyword in _MANY or keyword == "items") and isinstance(value, (list, tuple)):
            yield from ((f"{keyword}/{place}", inner) for place, inner in enumerate(value))
        elif keyword in _ONE:
            yield keyword, value


def _required(node: Mapping[str, Any]) -> set[str]:
    names = node.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


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
