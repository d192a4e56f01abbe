"""A JSON schema as a grammar in xgrammar's EBNF, with spaces where json.dumps puts them.

The library's own reading of a schema lets white space go on without an end, and passes over several keywords in
silence. Here every keyword that asserts something is either in the grammar or refused by its name. An answer may be
held to less than the schema allows (an object with declared properties has no others), never to more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qvl.backends.grammar_schema import CHECKED_AFTERWARDS
from qvl.backends.openvino.ebnf_values import CHARACTER, NUMBER, empty, integer, lacks, number, string
from qvl.backends.schema_bounds import at_pointer

if TYPE_CHECKING:
    from qvl.types import JsonObject

ANY_JSON: Final = (
    r'any ::= map | list | "\"" char* "\"" | num | "true" | "false" | "null"',
    r'map ::= "{" ("\"" char* "\": " any (", \"" char* "\": " any)*)? "}"',
    r'list ::= "[" (any (", " any)*)? "]"',
    f"char ::= {CHARACTER}",
    f"num ::= {NUMBER}",
)
NOT_WRITTEN: Final = CHECKED_AFTERWARDS | {"multipleOf", "dependencies", "patternProperties"}
# Schemas that are composed with others before this is taken for a circle.
MAX_MERGES: Final = 10_000
_KINDS: Final = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "additionalItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_ALTERNATIVES: Final = ("anyOf", "oneOf")


class SchemaGrammar:
    """Writes the grammar of one schema, which `enforceable` has made ready.

    Args:
        schema: with its definitions.
        param: of the request, which a refusal names.
    """

    def __init__(self, schema: JsonObject, param: str) -> None:
        self._schema = schema
        self._param = param
        self._rules: list[str] = []
        self._names: dict[str, str] = {}  # of rules, by their bodies
        self._referred: dict[str, str] = {}  # the same, by the pointers that mean them
        self._within: list[str] = []  # pointers whose rules have nothing before the place that is written
        self._merges = 0

    def text(self) -> str:
        """Return the grammar.

        Raises:
                UnsupportedInputError: the schema asserts what the grammar cannot say.
            RequestError: nothing fits the schema.
        """
        try:
            root = self._value(self._schema)
        except RecursionError:
            raise lacks("allOf and $ref that lead into each other", self._param) from None
        return "\n".join([f"root ::= {root}", *self._rules, *ANY_JSON])

    def _rule(self, body: str) -> str:
        """Return the name of the rule with this body."""
        if body not in self._names:
            self._names[body] = f"r{len(self._names)}"
            self._rules.append(f"{self._names[body]} ::= {body}")
        return self._names[body]

    def _value(self, schema: object) -> str:
        """Return the expression of a value, in one piece."""
        if schema is True or schema == {}:
            return "any"
        if not isinstance(schema, Mapping):
            raise empty("a part of it is false", self._param)
        if isinstance(schema.get("$ref"), str) and not self._asserts(schema, "$ref"):
            return self._reference(schema["$ref"])
        node = self._merged(schema)
        for word in _ALTERNATIVES:
            if word in node:
                return self._one_of(word, node)
        if absent := sorted(node.keys() & NOT_WRITTEN):
            raise lacks(absent[0], self._param)
        return self._plain(node)

    def _plain(self, node: JsonObject) -> str:
        kinds = node.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "const" in node or "enum" in node:
            values = [node["const"]] if "const" in node else node["enum"]
            fitting = [value for value in values if kinds is None or any(_is_a(value, kind) for kind in kinds)]
            if not fitting:
                raise empty(f"none of its values is of the type {kinds}", self._param)
            return _either([_literal(json.dumps(value, ensure_ascii=False)) for value in fitting])
        if kinds is None:
            kinds = [kind for kind, words in _KINDS.items() if any(word in node for word in words)][:1]
        return _either([self._of_kind(kind, node) for kind in kinds]) if kinds else "any"

    def _of_kind(self, kind: str, node: JsonObject) -> str:
        if kind in ("object", "array"):
            within, self._within = self._within, []
            body = self._object(node) if kind == "object" else self._array(node)
            self._within = within
            return body
        if kind in ("string", "integer", "number"):
            write = {"string": string, "integer": integer, "number": number}[kind]
            return self._rule(write(node, self._param))
        return '("true" | "false")' if kind == "boolean" else '"null"'

    def _object(self, node: JsonObject) -> str:
        declared = dict(node.get("properties") or {})
        required = list(node.get("required") or ())
        others = node.get("additionalProperties", True)
        declared |= {name: others for name in required if name not in declared}
        # A property that cannot be is left out; a required one makes the whole impossible, which `_value` says.
        declared = {name: inner for name, inner in declared.items() if inner is not False or name in required}
        if not declared:
            if others is False:
                return '"{}"'
            pair = f'"\\"" char* "\\": " {self._value(others)}'
            return self._rule(f'"{{" ({pair} (", " {pair})*)? "}}"')
        starts: list[str] = []
        rest = end = '"}"'
        for name, inner in reversed(declared.items()):
            pair = self._rule(f"{_literal(json.dumps(name, ensure_ascii=False) + ': ')} {self._value(inner)}")
            # Whatever stands behind the first required property cannot be the first of all.
            starts = [f"{pair} {rest}", *([] if name in required else starts)]
            rest = self._rule(f'", " {pair} {rest}' if name in required else f'(", " {pair})? {rest}')
        if not required:
            starts.append(end)
        return self._rule(f'"{{" {_either(starts)}')

    def _array(self, node: JsonObject) -> str:
        first, items = node.get("prefixItems"), node.get("items", True)
        if isinstance(items, Sequence):
            first, items = items, node.get("additionalItems", True)  # as drafts before 2020-12 spell it
        prefix = [self._value(inner) for inner in first or ()]
        least, most = node.get("minItems", 0), node.get("maxItems")
        prefix = prefix[:most] if most is not None else prefix
        least = max(0, least - len(prefix))
        most = 0 if items is False else None if most is None else most - len(prefix)
        if most is not None and least > most:
            raise empty(f"a list of {least + len(prefix)} to {most + len(prefix)} items", self._param)
        inner = "" if most == 0 else self._value(items)
        if prefix:
            more = f' (", " {inner}){_times(least, most)}' if inner else ""
            return self._rule('"[" ' + ' ", " '.join(prefix) + f'{more} "]"')
        if not inner:
            return '"[]"'
        several = f'{inner} (", " {inner}){_times(max(0, least - 1), None if most is None else most - 1)}'
        return self._rule(f'"[" {several} "]"' if least else f'"[" ({several})? "]"')

    def _one_of(self, word: str, node: JsonObject) -> str:
        branches = node[word]
        if word == "oneOf" and len(branches) > 1 and not _disjoint([self._merged(branch) for branch in branches]):
            raise lacks("oneOf of schemas that may fit at once", self._param)
        beside = {key: value for key, value in node.items() if key != word}
        if not self._asserts(beside):
            return _either([self._value(branch) for branch in branches])
        return _either([self._value({"allOf": [beside, branch]}) for branch in branches])

    def _reference(self, pointer: str) -> str:
        """Return the name of the rule of what a pointer means, which may hold itself."""
        if pointer in self._within:
            raise empty(f"{pointer} means itself", self._param)
        name = self._referred.get(pointer)
        if name is None:
            name = self._referred[pointer] = f"d{len(self._referred)}"
            self._within.append(pointer)
            self._rules.append(f"{name} ::= {self._value(at_pointer(self._schema, pointer))}")
            self._within.pop()
        return name

    def _asserts(self, node: Mapping[str, object], *but: str) -> bool:
        """True if `node` has a keyword that says something about a value."""
        words = {word for kind in _KINDS.values() for word in kind} | NOT_WRITTEN
        return bool((words | {"type", "const", "enum", "$ref", "allOf", *_ALTERNATIVES}) & (node.keys() - {*but}))

    def _merged(self, schema: object) -> JsonObject:
        """Return `schema` without $ref and allOf: what they say stands in it, or in the schemas of its properties."""
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            raise empty("a part of it is false", self._param)
        self._merges += 1
        if self._merges > MAX_MERGES:
            raise lacks("allOf and $ref that lead into each other", self._param)
        whole: JsonObject = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        parts = [at_pointer(self._schema, schema["$ref"])] if "$ref" in schema else []
        for part in [*parts, *schema.get("allOf", ())]:
            whole = self._both(whole, self._merged(part))
        return whole

    def _both(self, one: JsonObject, other: JsonObject) -> JsonObject:
        """Return what two schemas say together, neither of which has $ref or allOf."""
        whole = dict(one)
        for key, value in other.items():
            if key not in whole or whole[key] == value or whole[key] is True:
                whole[key] = value
            elif key == "properties":
                own: JsonObject = whole[key]
                whole[key] = own | {name: {"allOf": [own[name], i]} if name in own else i for name, i in value.items()}
            elif key == "required":
                whole[key] = list(dict.fromkeys([*whole[key], *value]))
            elif key == "additionalProperties":
                whole[key] = False if value is False or whole[key] is False else {"allOf": [whole[key], value]}
            elif key == "type":
                whole[key] = self._common(whole[key], value)
            elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems"):
                whole[key] = max(whole[key], value)
            elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems"):
                whole[key] = min(whole[key], value)
            elif self._asserts({key: value}):
                raise lacks(f"two of {key} together", self._param)
        for node in (one, other):
            others, own = node.get("additionalProperties", True), node.get("properties", {})
            if isinstance(others, Mapping) and whole.get("properties", {}).keys() - own.keys():
                raise lacks("allOf with additionalProperties", self._param)
            if others is False:
                whole["properties"] = {name: i for name, i in whole.get("properties", {}).items() if name in own}
        return whole

    def _common(self, one: str | list[str], other: str | list[str]) -> list[str]:
        first, second = ({kinds} if isinstance(kinds, str) else {*kinds} for kinds in (one, other))
        common = first & second
        if "integer" in first ^ second and "number" in first | second and not common & {"number"}:
            common |= {"integer"}
        if not common:
            raise empty(f"a value that is both {one} and {other}", self._param)
        return sorted(common)


def _literal(text: str) -> str:
    """Return `text` as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def _either(expressions: Sequence[str]) -> str:
    several = list(dict.fromkeys(expressions))
    return several[0] if len(several) == 1 else f"({' | '.join(several)})"


def _times(least: int, most: int | None) -> str:
    return "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"


def _is_a(value: object, kind: str) -> bool:
    """True if a JSON value is of a type of JSON Schema."""
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return not isinstance(value, bool) and (whole or (kind == "number" and isinstance(value, float)))
    known = {"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)}
    return isinstance(value, known.get(kind, ()))


def _disjoint(branches: Sequence[JsonObject]) -> bool:
    """True if no value can fit two of the branches, as their types or a constant of each tell."""
    kinds = [branch.get("type") for branch in branches]
    if all(isinstance(kind, str) for kind in kinds) and len({*kinds}) == len(kinds):
        return not {"integer", "number"} <= {*kinds}
    constants = [_constants(branch) for branch in branches]
    return any(len({tags.get(name, "") for tags in constants} - {""}) == len(branches) for name in constants[0])


def _constants(branch: JsonObject) -> dict[str, str]:
    """Return the required properties that have one value only, as JSON by name; "" is the branch itself."""
    found = {}
    for name, inner in {"": branch, **(branch.get("properties") or {})}.items():
        if isinstance(inner, Mapping) and (not name or name in (branch.get("required") or ())):
            values = [inner["const"]] if "const" in inner else inner.get("enum") or []
            if len(values) == 1:
                found[name] = json.dumps(values[0], sort_keys=True)
    return found
