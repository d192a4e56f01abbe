"""A pydantic model made from a JSON schema, so that its answers are validated like those of any other schema."""

from __future__ import annotations

import contextvars
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Final

from jsonschema import Draft3Validator, Draft202012Validator, FormatChecker, SchemaError, ValidationError, validators
from jsonschema.exceptions import best_match
from jsonschema.protocols import Validator
from pydantic import Field, RootModel, TypeAdapter, model_validator
from pydantic import ValidationError as PydanticError
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core import SchemaError as PatternError
from referencing import Registry

from qvl.backends.grammar_schema import compiler_reason, enforceable
from qvl.backends.schema_bounds import bound, plain
from qvl.errors import AnalysisError, RequestError
from qvl.evidence.answer_form import with_told_shapes
from qvl.types import JsonMapping, JsonObject

# Alternatives of alternatives double with each level of an answer, and the schema comes from anybody.
MAX_STEPS: Final = 50_000
_NOT_HONOURED: Final = frozenset({"unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"})
_LONGEST: Final = 300
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA: Final = ("const", "enum", "default", "examples", "example")
_steps: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps")
_nothing: Final[Registry[JsonObject]] = Registry()  # the default one would fetch what a `$ref` names


class _Answer(RootModel[JsonObject]):
    """A JSON object; a subclass for each schema validates it."""


def model_of(schema: JsonMapping) -> type[_Answer]:
    """Return a pydantic RootModel that accepts what `schema` accepts and whose own JSON schema is `schema`.

    Properties that are not required may be null, since prompts ask for null if a picture does not show a value.

    Raises:
        RequestError: `schema` is invalid, too large, not of type object, or has an unsupported keyword.
    """
    if not isinstance(schema, Mapping):
        raise _refused("must be an object")
    own_schema = with_told_shapes(with_object_on_top(schema))
    if own_schema.get("type") != "object":
        hint = '{"type": "object", "properties": {…}}'
        raise RequestError("schema must be of type object", hint=hint, param="schema", code="invalid_schema")
    check = _check_of(own_schema)

    def checked(data: object) -> object:
        if (wrong := check(data)) is not None:
            raise wrong
        return data

    def model_json_schema(cls: type[_Answer], /, *args: object, **options: object) -> JsonObject:
        return own_schema

    title = schema.get("title")
    name = title if isinstance(title, str) and title.isidentifier() else "Answer"
    # The schema that the answer must follow is the client's own, word for word.
    own = {
        "__module__": __name__,
        "model_json_schema": classmethod(model_json_schema),
        "checked": model_validator(mode="before")(staticmethod(checked)),
    }
    return type(name, (_Answer,), own)


def with_object_on_top(schema: JsonMapping) -> JsonObject:
    """Return `schema` with a `$ref` at its top replaced by the definition, since endpoints require an object there."""
    top = dict(schema)
    for _ in range(8):
        reference = top.get("$ref")
        name = str(reference).rpartition("/")[2]
        definitions = top.get(next((word for word in ("$defs", "definitions") if reference == f"#/{word}/{name}"), ""))
        target = definitions.get(name) if isinstance(definitions, Mapping) else None
        if not isinstance(target, Mapping):
            break
        top = {**{word: value for word, value in top.items() if word != "$ref"}, **target}
    if "properties" in top:
        top.setdefault("type", "object")
    return top


def _check_of(schema: JsonObject) -> Callable[[object], PydanticError | None]:
    """A function that returns the validation error of an answer, or None if it fits `schema`."""
    bound(plain(schema, "schema"), "schema", validated=True)  # before anything else is read of it
    if not isinstance(schema.get("$schema", ""), str):
        raise _refused("is invalid: $schema must be a string")
    base = validators.validator_for(schema, default=Draft202012Validator)
    if base is Draft3Validator:
        raise _refused("is of draft 3, which is unsupported")
    try:
        # Without formats: Python would judge patterns, which are not matched by it.
        base.check_schema(schema, format_checker=FormatChecker(()))
    except SchemaError as exc:
        path = ".".join(map(str, exc.absolute_path)) or "it"
        raise _refused(f"is invalid: {path} {exc.message}") from exc
    enforceable(schema, "schema", validated=True)  # its references
    _read(schema)
    validator = _validator_class(base)(schema, registry=_nothing)
    _refuse_circles(validator, schema)

    def check(data: object) -> PydanticError | None:
        token = _steps.set([MAX_STEPS])
        try:
            wrong = best_match(validator.iter_errors(data))
        except (_TooManyStepsError, RecursionError, OverflowError) as exc:
            why = "takes too many steps to check" if isinstance(exc, _TooManyStepsError) else "is nested too deeply"
            raise AnalysisError(
                f"the answer {why}", raw=json.dumps(data)[:_LONGEST], hint="use a schema with fewer alternatives"
            ) from None
        finally:
            _steps.reset(token)
        if wrong is None:
            return None
        kind = PydanticCustomError("json_schema", "{reason}", {"reason": wrong.message[:_LONGEST]})
        details = InitErrorDetails(type=kind, loc=tuple(wrong.absolute_path), input=wrong.instance)
        return PydanticError.from_exception_data("Answer", [details])

    return check


def _refuse_circles(validator: Validator, schema: JsonObject) -> None:
    definitions = [part for word in ("$defs", "definitions") if isinstance(part := schema.get(word), dict)]
    for part in (schema, *(inner for one in definitions for inner in one.values() if isinstance(inner, dict))):
        token = _steps.set([MAX_STEPS])
        try:
            validator.evolve(schema=part).is_valid({})
        except RecursionError:
            raise _refused("refers to itself endlessly") from None
        except _TooManyStepsError:
            raise _refused("takes too many steps to check: too many nested alternatives") from None
        finally:
            _steps.reset(token)


def _read(node: object) -> None:
    """Raise for a keyword that is valid JSON schema but that answers cannot be checked against."""
    if isinstance(node, list):
        for inner in node:
            _read(inner)
    if not isinstance(node, dict):
        return
    if word := next((word for word in node if word in _NOT_HONOURED), None):
        raise _refused(f"has the keyword {word!r}, which is unsupported")
    patterns = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
    for pattern in (*patterns, *(node.get("patternProperties") or ())):
        try:
            _pattern(pattern)
        except PatternError as exc:
            reason = compiler_reason("\n".join(str(exc).splitlines()[1:]) or str(exc)).strip()
            reason = reason.removeprefix("SchemaError: ").removeprefix("invalid pattern: ")
            raise _refused(f"has the pattern {pattern[:50]!r}, which cannot be read: {reason}") from exc
    if node.get("enum") == []:
        raise _refused("has an empty 'enum'")
    for word, value in node.items():
        if word not in _DATA:
            _read(list(value.values()) if word in _NAMED and isinstance(value, dict) else value)


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> Callable[[str], bool]:
    """A regex search by pydantic's linear-time engine: Python's `re` may backtrack for ever on a hostile pattern."""
    adapter = TypeAdapter(Annotated[str, Field(pattern=pattern)])

    def matches(text: str) -> bool:
        try:
            adapter.validate_python(text)
        except PydanticError:
            return False
        return True

    return matches


class _TooManyStepsError(Exception):
    pass


def _counted(keyword: Callable[..., Iterator[ValidationError] | None]) -> Callable[..., Iterator[ValidationError]]:
    def check(validator: Validator, value: object, instance: object, schema: object) -> Iterator[ValidationError]:
        steps = _steps.get()
        steps[0] -= 1
        if steps[0] < 0:
            raise _TooManyStepsError
        yield from keyword(validator, value, instance, schema) or ()

    return check


@functools.cache
def _validator_class(base: type[Validator]) -> type[Validator]:
    own = {
        "type": _type,
        "properties": _properties,
        "pattern": _matches,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "multipleOf": _multiple_of,
        "uniqueItems": _unique_items,
    }
    known = {**base.VALIDATORS, **own}
    counted: type[Validator] = validators.extend(base, {word: _counted(check) for word, check in known.items()})
    return counted


def _type(
    validator: Validator, types: str | list[str], instance: object, schema: JsonObject
) -> Iterator[ValidationError]:
    if instance is None and schema.get("nullable") is True:
        return
    kinds = [types] if isinstance(types, str) else types
    if not any(validator.is_type(instance, kind) for kind in kinds):
        yield ValidationError(f"{instance!r:.100} is not of type {', '.join(map(repr, kinds))}")


def _properties(
    validator: Validator, properties: JsonObject, instance: object, schema: JsonObject
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    required = schema.get("required") or ()
    for name, inner in properties.items():
        if name in instance and (instance[name] is not None or name in required):
            yield from validator.descend(instance[name], inner, path=name, schema_path=name)


def _matches(validator: Validator, pattern: str, instance: object, schema: object) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _pattern(pattern)(instance):
        yield ValidationError(f"{instance!r:.100} does not match {pattern!r}")


def _pattern_properties(
    validator: Validator, patterns: JsonObject, instance: object, schema: object
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, inner in patterns.items():
        for name, value in instance.items():
            if _pattern(pattern)(name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(
    validator: Validator, more: object, instance: object, schema: JsonObject
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    named, patterns = schema.get("properties") or {}, schema.get("patternProperties") or {}
    for name, value in instance.items():
        if name in named or any(_pattern(pattern)(name) for pattern in patterns):
            continue
        if more is False:
            yield ValidationError(f"the property {name!r:.100} is not in the schema")
        elif more is not True:
            yield from validator.descend(value, more, path=name)


def _multiple_of(validator: Validator, step: float, instance: object, schema: object) -> Iterator[ValidationError]:
    if isinstance(instance, bool) or not isinstance(instance, int | float):
        return
    try:
        # As written: 19.99 is a multiple of 0.01, of which binary numbers know nothing.
        rest = _exact(instance) % _exact(step)
    except ValueError:
        rest = Fraction(1)
    if rest:
        yield ValidationError(f"{instance!r:.100} is not a multiple of {step!r}")


def _exact(number: float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def _unique_items(validator: Validator, unique: bool, instance: object, schema: object) -> Iterator[ValidationError]:
    if not unique or not isinstance(instance, list):
        return
    if len({json.dumps(item, sort_keys=True) for item in instance}) < len(instance):
        yield ValidationError("the items are not all different")


def _refused(what: str) -> RequestError:
    return RequestError(f"the schema {what}"[:_LONGEST], param="schema", code="invalid_schema")
