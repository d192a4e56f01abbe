"""Rewrites a client's JSON schema for the grammar compiler: within limits, with closed objects.

Keywords that no grammar enforces are removed. The local engine and vLLM compile the result with the same compiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urldefrag, urljoin

from qvl.backends.schema_bounds import (
    MAPS,
    MAX_FORMS,
    MAX_MULTIPLE,
    MAX_TOOLS,
    at_pointer,
    bound,
    mapped,
    multiple,
    plain,
    too_large,
    without_large_multiples,
)
from qvl.errors import RequestError

if TYPE_CHECKING:
    from qvl.types import JsonMapping, JsonObject, Tool

# Answers that have the form they must, since a grammar holds them to it.
RESPONSE_FORMATS: Final = frozenset({"text", "json_object", "json_schema", "regex", "choice", "grammar"})
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
_ONE: Final = frozenset(
    {"items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
_MANY: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SAME_VALUE: Final = frozenset({"allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "$ref"})
_DEFINITION: Final = re.compile(r"/(?:\$defs|definitions)/[^/]*")
# Where it stands in the grammar that was made around a schema or pattern.
_AROUND: Final = re.compile(
    r"^(?:at )?(?:\d+\(\d+\): )?(?:failed to compile JSON schema: |invalid regex .*? \(in regex\): )?", re.DOTALL
)
_SAYS_OTHERWISE: Final = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def enforceable(schema: object, param: str, *, validated: bool = False) -> JsonObject:
    """Return a copy of `schema` for the compiler: objects closed by default, annotations removed.

    `param`: the field named in errors. `validated`: the answer is validated later, so large multipleOf are dropped.

    Raises:
        RequestError: `schema` is not an object, or too large to be compiled for one request.
    """
    if not isinstance(schema, Mapping):
        raise RequestError("the schema must be an object", param=param, code="invalid_schema")
    copy = plain(schema, param)
    if validated:
        copy = without_large_multiples(copy)
    bound(copy, param)
    reader = _SchemaRewriter(copy, "#", param)
    whole = reader.root()
    if reader.opened:
        own = whole.get("$defs")
        whole["$defs"] = {**(own if isinstance(own, dict) else {}), **reader.opened}
    return whole


_ELSEWHERE: Final = frozenset({"$ref", "allOf", "anyOf", "oneOf", "const", "enum"})


def call_schema(tools: Sequence[Tool]) -> JsonObject:
    """Return the schema of a call of any of `tools`: an object of name and arguments.

    Each tool's parameters become a definition of their own, to which their references are rewritten.

    Raises:
        RequestError: the parameters of a tool are too large, or there are more than MAX_TOOLS tools.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"too many tools: {len(tools)}", hint=f"at most {MAX_TOOLS}", param="tools")
    definitions: JsonObject = {}
    calls: list[JsonObject] = []
    for number, tool in enumerate(tools):
        parameters = plain(tool.parameters or {"type": "object", "properties": {}}, "tools")
        # Who calls a function checks what it is called with: more than a grammar can enforce is no reason to refuse.
        parameters = without_what_is_checked_afterwards(parameters)
        if not isinstance(parameters.get("type"), str) and not parameters.keys() & _ELSEWHERE:
            # Arguments are an object, whatever else a schema without a type would let through.
            parameters = {**parameters, "type": "object"}
        bound(parameters, "tools")
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
    bound(whole, "tools")
    return whole


def without_what_is_checked_afterwards(schema: JsonObject) -> JsonObject:
    """Return `schema` without keywords that no grammar enforces, for an answer that is validated afterwards."""

    def drop(node: JsonObject) -> JsonObject:
        return {key: value for key, value in node.items() if key not in CHECKED_AFTERWARDS}

    return without_large_multiples(mapped(schema, drop))


class _SchemaRewriter:
    """Rewrites one schema to be placed at the JSON pointer `target` of the result.

    `opened` are extra definitions for references: closed copies of subschemas that are not definitions, and open copies
    of those that an allOf composes, where an object may have the properties of the other branches.
    """

    def __init__(self, schema: JsonMapping, target: str, param: str) -> None:
        self._schema = schema
        self._target = target
        self._param = param
        self._pointers: dict[str, str] = {}
        self._steps = MAX_STEPS
        self._copies: dict[tuple[str, bool], str] = {}
        self._counted: dict[tuple[str, ...], tuple[int, int]] = {}
        self.opened: JsonObject = {}
        self._index(schema, "", "")

    def root(self) -> JsonObject:
        try:
            return self._rewrite(self._schema, "", closed=True)
        except RecursionError:
            raise too_large("a schema whose references follow each other so far", "flatten it", self._param) from None
        except (TypeError, AttributeError) as exc:
            # Only a value of another kind than its keyword takes leads here.
            raise RequestError(
                "invalid schema: a keyword has an invalid value",
                hint="check it against https://json-schema.org/draft/2020-12/schema",
                param=self._param,
                code="invalid_schema",
            ) from exc

    def _index(self, node: object, pointer: str, base: str) -> None:
        """Index the pointers of all `$id` and `$anchor`."""
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

    def _resolve(self, ref: object, base: str) -> str:
        """Return the JSON pointer in the schema to which `ref` resolves."""
        whole, fragment = urldefrag(urljoin(base, str(ref)) if base else str(ref))
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            pointer = self._pointers.get(f"{whole}#{fragment}")
        else:
            root = self._pointers.get(whole, None if whole else "")
            pointer = None if root is None else root + fragment
        if pointer is None or self._at(pointer) is None:
            raise RequestError(
                f"unresolved reference {str(ref)[:80]!r} in the schema",
                hint="references stay within the schema, such as #/$defs/Name",
                param=self._param,
                code="invalid_schema",
            )
        return pointer

    def _at(self, pointer: str) -> object:
        return at_pointer(self._schema, pointer)

    def _base(self, pointer: str) -> str:
        """Return the base URI (`$id`) in effect at a pointer."""
        base, steps = "", pointer.split("/")
        for size in range(1, len(steps) + 1):
            node = self._at("/".join(steps[:size]))
            if isinstance(node, Mapping) and isinstance(node.get("$id"), str):
                base = urljoin(base, node["$id"])
        return base

    def _write(self, node: object, pointer: str, *, closed: bool) -> object:
        return self._rewrite(node, pointer, closed=closed) if isinstance(node, Mapping) else node

    def _rewrite(self, node: JsonMapping, pointer: str, *, closed: bool) -> JsonObject:
        """Return `node` rewritten; with `closed=False` it allows further properties, of schemas composed with it."""
        several = any(word in node for word in _SAME_VALUE)
        if several:
            self._alternatives([pointer])
        # One reference, or one of several forms, and nothing beside it: each form is an object of its own.
        apart = "allOf" not in node and not any(
            word in node for word in ("properties", "if", "dependentSchemas", "required", *_SAYS_OTHERWISE)
        )
        apart = apart and sum(word in node for word in ("$ref", "anyOf", "oneOf")) <= 1
        written: JsonObject = {}
        for keyword, value in node.items():
            if keyword in ("$id", "$anchor", "$dynamicAnchor") or keyword == "uniqueItems":
                continue
            if keyword == "format" and value not in FORMATS:
                continue
            path = f"{pointer}/{keyword}"
            within = closed and apart if keyword in _SAME_VALUE else keyword != "not"
            if keyword == "$ref":
                written[keyword] = self._reference(self._resolve(value, self._base(pointer)), closed=within)
            elif keyword in _ONE and not isinstance(value, (list, tuple)):
                written[keyword] = self._write(value, path, closed=within)
            elif (keyword in _MANY or keyword == "items") and isinstance(value, (list, tuple)):
                written[keyword] = [
                    self._write(inner, f"{path}/{index}", closed=within) for index, inner in enumerate(value)
                ]
            elif keyword in MAPS and isinstance(value, Mapping):
                written[keyword] = {
                    name: self._write(inner, f"{path}/{_escape(name)}", closed=within) for name, inner in value.items()
                }
            else:
                written[keyword] = value
        if closed and not (several and apart):
            self._close(node, pointer, written)
        return written

    def _close(self, node: JsonMapping, pointer: str, written: JsonObject) -> None:
        names: JsonObject = {}
        declaring: list[str] = []
        if not self._names(node, pointer, names, set(), declaring) or not declaring:
            return  # where no `properties` stand, any name is welcome
        if any(word in node for word in _SAME_VALUE):
            # A branch of its own that knows all names: closing each branch would forbid the names of the others.
            all_names = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
            written["allOf"] = [*written.get("allOf", ()), all_names]
        else:
            others = {name: True for name in names if name not in written["properties"]}
            written["properties"] = {**written["properties"], **others}
            written["additionalProperties"] = False

    def _names(self, node: object, pointer: str, names: JsonObject, visited: set[str], declaring: list[str]) -> bool:
        """Collect the property names of an object over all its branches; False if one allows additional properties.

        `declaring` collects the branches that have `properties`, even empty ones.
        """
        if not isinstance(node, Mapping) or pointer in visited:
            return True
        visited.add(pointer)
        names.update(dict.fromkeys(_required(node)))
        self._steps -= 1 + len(names)
        if self._steps < 0:
            raise too_large("a schema that composes so many names", "leave some out", self._param)
        if any(word in node and node[word] is not False for word in _SAYS_OTHERWISE):
            return False
        if isinstance(node.get("properties"), Mapping):
            names.update(dict.fromkeys(node["properties"]))
            declaring.append(pointer)
        if "$ref" in node:
            target = self._resolve(node["$ref"], self._base(pointer))
            if not self._names(self._at(target), target, names, visited, declaring):
                return False
        return all(
            self._names(inner, f"{pointer}/{path}", names, visited, declaring)
            for path, inner in _parts(node)
            if path.partition("/")[0] in _SAME_VALUE
        )

    def _reference(self, pointer: str, *, closed: bool) -> str:
        """Return a reference to the rewritten target, which is rewritten into a new definition unless it has one."""
        if closed and (not pointer or _DEFINITION.fullmatch(pointer)):
            return self._target + _fragment(pointer)
        name = self._copies.get((pointer, closed))
        if name is None:
            stem = ("closed" if closed else "open") + self._target[1:] + pointer
            name = stem = stem.replace("/", ".").replace("~", "-")
            while name in self.opened or self._at(f"/$defs/{_escape(name)}") is not None:
                name += "-"
            self._copies[pointer, closed] = name
            self.opened[name] = {}  # before the target is read, which may refer to itself
            self.opened[name] = self._write(self._at(pointer), pointer, closed=closed)
        return f"#/$defs/{_fragment(name)}"

    def _alternatives(self, pointers: Sequence[str]) -> tuple[int, int]:
        """Return (forms, multiple) of a value that must match all `pointers`; the compiler expands each combination.

        Raises:
            RequestError: there are too many.
        """
        key = tuple(sorted(pointers))
        if key in self._counted:
            return self._counted[key]
        self._counted[key] = (1, 1)  # what refers to itself
        forms, multiples, factors, composed, visited = 1, 1, 0, False, set[str]()
        inside: dict[str, list[str]] = {}
        pending = list(pointers)
        while pending:
            pointer = pending.pop()
            node = self._at(pointer)
            if pointer in visited or not isinstance(node, Mapping):
                continue
            visited.add(pointer)
            self._steps -= 1 + len(node.get("properties") or ())
            if self._steps < 0:
                raise too_large("a schema that composes so many names", "leave some out", self._param)
            composed = composed or len(visited) > 1 or "properties" in node
            multiples *= multiple(dict(node))
            if "$ref" in node:
                pending.append(self._resolve(node["$ref"], self._base(pointer)))
            ways: dict[str, list[tuple[int, int]]] = {}
            for path, _ in _parts(node):
                word = path.partition("/")[0]
                if word == "allOf":
                    pending.append(f"{pointer}/{path}")
                elif word in ("anyOf", "oneOf"):
                    ways.setdefault(word, []).append(self._alternatives([f"{pointer}/{path}"]))
                elif word in ("properties", "items"):
                    inside.setdefault(path, []).append(f"{pointer}/{path}")
            for options in ways.values():
                factors += len(options) > 1
                forms *= sum(count for count, _ in options)
                multiples *= max(step for _, step in options)
        for group in inside.values():
            if len(group) > 1:
                self._alternatives(group)  # each name combines on its own: they add up and do not multiply
        # A list of alternatives may be long; multiplied with each other, a few are too many.
        most = MAX_FORMS if factors > 1 else MAX_FORMS**2 // 4 if composed else forms
        if forms > most:
            raise too_large(
                f"a schema whose alternatives combine in more than {most} ways", "leave some out", self._param
            )
        if multiples > MAX_MULTIPLE:
            raise too_large("multipleOf of so large numbers", f"at most {MAX_MULTIPLE} multiplied", self._param)
        self._counted[key] = (forms, multiples)
        return forms, multiples


def _fragment(pointer: str) -> str:
    """Return a pointer percent-encoded for a reference."""
    return quote(pointer, safe="/~$")


def _escape(name: str) -> str:
    """Return a name escaped as a segment of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def _parts(node: JsonMapping) -> Iterator[tuple[str, object]]:
    """Yield (relative pointer, subschema) of the direct subschemas of `node`."""
    for keyword, value in node.items():
        if keyword in MAPS and isinstance(value, Mapping):
            yield from ((f"{keyword}/{_escape(name)}", inner) for name, inner in value.items())
        elif (keyword in _MANY or keyword == "items") and isinstance(value, (list, tuple)):
            yield from ((f"{keyword}/{index}", inner) for index, inner in enumerate(value))
        elif keyword in _ONE:
            yield keyword, value


def _required(node: JsonMapping) -> set[str]:
    names = node.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def compiler_reason(message: str) -> str:
    """Return the grammar compiler's message as one line; of a pattern, the error and its position."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    for number, line in enumerate(lines[1:], start=1):
        # Numbered lines are of the grammar that was made around the schema or pattern: they tell nobody anything.
        if re.fullmatch(r" +\^+", line) and not re.match(r" *\d+ \| ", lines[number - 1]):
            # The compiler shows the pattern indented by four, and carets below what it stumbled over.
            pattern, at = lines[number - 1][4:], line.index("^") - 4
            what = next((one.removeprefix("error: ") for one in lines[number:] if one.startswith("error: ")), "")
            near = pattern[max(0, at - 12) : at + 24]
            return f"invalid pattern: {what or 'it cannot be read'}, at character {at + 1}, near {near!r}"
    reason = _AROUND.sub("", lines[0] if lines else "it cannot be read")
    return "it is too complex for the grammar compiler" if "panic" in reason.lower() else reason[:300]
