"""A pydantic model out of a JSON schema, so that `/v1/analyze` validates answers as the pipeline's own verb does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from qvl.errors import RequestError

MAX_DEPTH: Final = 16
MAX_FIELDS: Final = 200
MAX_PARTS: Final = 1_000
_PLAIN: Final[dict[str, Any]] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
_BOUNDS: Final = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "minLength": "min_length",
    "maxLength": "max_length",
    "minItems": "min_length",
    "maxItems": "max_length",
    "pattern": "pattern",
    "multipleOf": "multiple_of",
}
_REMARKS: Final = frozenset(
    {"title", "description", "examples", "default", "$schema", "$id", "$comment", "$defs", "definitions", "format"}
)
_KNOWN: Final = _REMARKS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "$ref",
    *_BOUNDS,
}


def model_of(schema: Mapping[str, Any]) -> type[BaseModel]:
    """A model that accepts what `schema` accepts, and whose own JSON schema is `schema`.

    Raises:
        RequestError: it is not of type object, or has a keyword that is not honoured here.
    """
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), Mapping):
        raise RequestError(
            "schema must be of type object with properties",
            hint='{"type": "object", "properties": {…}}',
            param="schema",
        )
    title = schema.get("title")
    name = title if isinstance(title, str) and title.isidentifier() else "Answer"
    reader = _Reader(schema)
    found = reader.object(schema, name, 0)
    given = dict(schema)
    # A subclass, because the schema that the model's answer must follow is the client's own, word for word.
    own = {"model_json_schema": classmethod(_fixed(given)), "model_dump": _dump, "__module__": __name__}
    return type(name, (found,), own)


def _dump(self: BaseModel, **options: Any) -> dict[str, Any]:
    """By the client's names; what the model's answer left out stays out."""
    return BaseModel.model_dump(self, **{"by_alias": True, "exclude_unset": True, **options})


def _fixed(schema: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def model_json_schema(cls: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return schema

    return model_json_schema


class _Reader:
    """Reads each definition once: one that is referred to from many places costs no more than from one."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._fields = 0
        self._parts = 0
        self._targets: dict[str, Any] = {}

    def object(self, schema: Mapping[str, Any], name: str, depth: int) -> type[BaseModel]:
        required = schema.get("required") or []
        fields: dict[str, Any] = {}
        for number, (key, inner) in enumerate(schema["properties"].items()):
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise _refused(f"has more than {MAX_FIELDS} properties")
            kind = self.read(inner, depth + 1)
            # Names of fields are any text in JSON, but not in Python, so every field has an alias.
            if key in required:
                fields[f"f{number}"] = (kind, Field(alias=key))
            else:
                fields[f"f{number}"] = (kind | None, Field(None, alias=key))
        extra: Any = "allow" if schema.get("additionalProperties", True) is not False else "forbid"
        config = ConfigDict(extra=extra, protected_namespaces=())
        return create_model(name, __config__=config, **fields)

    def read(self, schema: Any, depth: int) -> Any:
        """The Python type of `schema`."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _refused(f"has more than {MAX_PARTS} parts")
        if depth > MAX_DEPTH:
            raise _refused(f"is deeper than {MAX_DEPTH} levels, or refers to itself")
        if schema is True or schema == {}:
            return Any
        if not isinstance(schema, Mapping):
            raise _refused("has a part that is no object")
        for keyword in schema:
            if keyword not in _KNOWN:
                raise _refused(f"has the keyword {str(keyword)[:50]!r}, which is not honoured here")
        if "$ref" in schema:
            reference = str(schema["$ref"])
            if reference not in self._targets:
                # Until it has been read, one that leads back to itself is read again, and found to be too deep.
                self._targets[reference] = self.read(self._target(reference), depth + 1)
            return self._targets[reference]
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._union([self.read(inner, depth + 1) for inner in _several(schema[union], union)])
        if "const" in schema or "enum" in schema:
            return _literal([schema["const"]] if "const" in schema else schema["enum"])
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._union([self.read({**schema, "type": one}, depth + 1) for one in _several(kind, "type")])
        return self._typed(kind, schema, depth)

    def _typed(self, kind: Any, schema: Mapping[str, Any], depth: int) -> Any:
        found: Any
        if kind == "object" or (kind is None and "properties" in schema):
            if isinstance(schema.get("properties"), Mapping):
                return self.object(schema, "Part", depth)
            more = schema.get("additionalProperties", True)
            return dict[str, self.read(more, depth + 1) if isinstance(more, Mapping) else Any]  # type: ignore[misc]
        if kind == "array":
            found = list[self.read(schema.get("items", {}), depth + 1)]  # type: ignore[misc]
        elif kind in _PLAIN:
            found = _PLAIN[kind]
        else:
            raise _refused(f"has the type {str(kind)[:50]!r}")
        bounds = {word: schema[keyword] for keyword, word in _BOUNDS.items() if keyword in schema}
        return Annotated[found, Field(**bounds)] if bounds else found

    @staticmethod
    def _union(kinds: list[Any]) -> Any:
        kinds = list({id(kind): kind for kind in kinds}.values())
        found = kinds[0]
        for kind in kinds[1:]:
            found = found | kind if kind is not None else found | None
        return found

    def _target(self, ref: Any) -> Any:
        target: Any = self._root
        for step in str(ref).removeprefix("#/").split("/"):
            if not isinstance(target, Mapping) or step not in target:
                raise _refused(f"refers to {str(ref)[:80]!r}, which is not in it")
            target = target[step]
        return target


def _several(value: Any, keyword: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _refused(f"has an empty {keyword!r}")
    return value


def _literal(values: Any) -> Any:
    if not isinstance(values, list) or not values:
        raise _refused("has an empty 'enum'")
    if not all(value is None or isinstance(value, str | int | bool) for value in values):
        raise _refused("has an 'enum' of other things than text, whole numbers, true, false and null")
    return Literal[tuple(values)]


def _refused(what: str) -> RequestError:
    return RequestError(f"the schema {what}", param="schema", code="invalid_schema")
