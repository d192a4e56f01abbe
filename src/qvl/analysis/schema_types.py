"""The types of `schema=`: a pydantic class, a JSON schema, or any type that pydantic supports, such as a dataclass."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Final, cast

import typing_extensions
from pydantic import BaseModel, RootModel, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from qvl import analysis
from qvl.analysis.portable_types import portable
from qvl.errors import ConfigError, QvlError
from qvl.types import JsonMapping, JsonObject

_ANSWER: Final = "answer"
_OF_THE_WHOLE: Final = ("$defs", "definitions", "$schema")


@dataclass(frozen=True, slots=True)
class SchemaType:
    """A pydantic class that validates the model's answer; `value` converts its instance to the user's type.

    `boxed` means that the answer is in a field `answer`, since endpoints accept only objects at the top of a schema.
    """

    model: type[BaseModel]
    value: Callable[[BaseModel], object]
    boxed: bool = False

    def inner(self, path: str) -> str:
        """Return where in the model's answer that is which the user sees at `path`."""
        return f"{_ANSWER}.{path}" if self.boxed and path != _ANSWER else path

    def outer(self, path: str) -> str:
        """Return where the user sees what the model writes at `path`."""
        return path.removeprefix(f"{_ANSWER}.") if self.boxed else path


def schema_type(schema: object) -> SchemaType:
    """Return the SchemaType of a user's `schema`.

    Answers are instances of a pydantic class or a dataclass, plain JSON values for a JSON schema, dictionaries for a
    TypedDict, and a list of bills for `list[Bill]`.

    Raises:
        ConfigError: `schema` is none of these, or JSON cannot represent it.
    """
    if isinstance(schema, Mapping):
        return _of_json_schema(schema)
    if not isinstance(schema, type) and (is_dataclass(schema) or isinstance(schema, BaseModel)):
        kind = type(schema).__qualname__
        raise ConfigError(f"schema= must be a class, not a {kind} instance", hint=f"pass schema={kind}", param="schema")
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            model: type[BaseModel] = schema
            plain: Callable[[BaseModel], object] = _itself
        else:
            model, plain = _root_of(schema), operator.attrgetter("root")
        box = analysis.boxed(model)
        (box or model).model_json_schema()
    except (PydanticUserError, SchemaError, TypeError, NameError, RecursionError) as exc:
        # What builds a pattern tells the reason last, all others first.
        reason = str(exc).strip().splitlines()[-1 if isinstance(exc, SchemaError) else 0].strip()
        raise ConfigError(
            f"schema={_shown(schema)} is not a type that pydantic supports: {reason}",
            hint="a pydantic model, a dataclass, a TypedDict, or a JSON schema",
            param="schema",
        ) from exc
    if box is None:
        return SchemaType(model, plain)
    inner = operator.attrgetter(_ANSWER)
    return SchemaType(box, lambda answer: plain(inner(answer)), boxed=True)


def _itself(value: object) -> object:
    return value


def _shown(schema: object) -> str:
    return getattr(schema, "__qualname__", None) or repr(schema)[:80]


def _unwrapped(schema: JsonMapping) -> JsonMapping:
    """The schema inside OpenAI's `response_format` or its `json_schema` object; else `schema` itself."""
    inner = schema.get("json_schema") if schema.get("type") == "json_schema" else schema
    own = inner.get("schema") if isinstance(inner, Mapping) and "name" in inner and "type" not in inner else None
    return own if isinstance(own, Mapping) else schema


def _of_json_schema(schema: JsonMapping) -> SchemaType:
    # Not on top: endpoints have no schemas, and reading one takes a library of its own.
    from qvl.analysis.schema_model import model_of, with_object_on_top

    schema = _unwrapped(schema)
    top = with_object_on_top(schema)
    boxed = top.get("type") != "object"
    try:
        if boxed:
            inner = {key: value for key, value in schema.items() if key not in (*_OF_THE_WHOLE, "title")}
            top = {key: schema[key] for key in (*_OF_THE_WHOLE, "title") if key in schema}
            top |= {"type": "object", "properties": {_ANSWER: _moved(inner)}, "required": [_ANSWER]}
        model = model_of(top)
    except RecursionError as exc:
        raise ConfigError("the schema is nested too deeply", hint="flatten it, or use $defs", param="schema") from exc
    except QvlError as exc:
        raise ConfigError(exc.message, hint=exc.hint, param="schema") from None
    value = operator.attrgetter("root")
    return SchemaType(model, (lambda answer: value(answer)[_ANSWER]) if boxed else value, boxed=boxed)


def _moved(schema: object) -> object:
    """`schema` with its `#/…` references rewritten for its new position."""
    if isinstance(schema, list):
        return [_moved(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: JsonObject = {key: _moved(value) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and re.match(r"#(?!/(\$defs|definitions)/)(/|$)", reference):
        moved["$ref"] = f"#/properties/answer{reference[1:]}"
    return moved


def _root_of(schema: object) -> type[BaseModel]:
    """A pydantic RootModel of any type that pydantic supports."""
    name = schema.__name__ if isinstance(schema, type) else "Answer"
    root = cast("type[BaseModel]", RootModel.__class_getitem__(portable(schema)))
    named = typing_extensions.is_typeddict(schema) or is_dataclass(schema)
    return create_model(name, __base__=root, __doc__=schema.__doc__ if named else None)
