"""Validation of request fields: each error is one line with the field's path and the known values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qvl.errors import RequestError, UnsupportedInputError
from qvl.types import JsonMapping


def wrong(param: str, fault: str, hint: str | None = None) -> RequestError:
    """Return a RequestError that names the field at path `param` and its `fault`, such as "is missing"."""
    code = "missing_required_parameter" if fault == "is missing" else "invalid_value"
    return RequestError(f"{param}: {fault}", hint=hint, param=param, code=code)


def unknown(param: str, value: object, known: Sequence[str]) -> RequestError:
    """Return a RequestError for a value that is not one of `known`."""
    return wrong(param, f"unknown value {str(value)[:80]!r}", f"known: {', '.join(known)}")


def text_of(fields: JsonMapping, name: str, where: str) -> str:
    """Return the text in the field `name` of the object at path `where`.

    Raises:
        RequestError: the field is missing or not a string.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        param = f"{where}.{name}"
        raise wrong(param, "is missing" if value is None else f"must be text, not {type_of(value)}")
    return value


def refuse_others(fields: JsonMapping, known: Sequence[str], echoes: Collection[str], where: str) -> None:
    """Check that every non-null field is in `known` or in `echoes`, the fields of answers that clients send back.

    Raises:
        UnsupportedInputError: an unknown field; the error lists the known ones.
    """
    for name, value in fields.items():
        if name not in echoes and name not in known and value is not None:
            param = f"{where}.{str(name)[:100]}"
            raise UnsupportedInputError(f"{param}: unknown field", hint=f"known: {', '.join(known)}", param=param)


def type_of(value: object) -> str:
    """Return the type of `value` for a message: its JSON name, such as "a list", else its Python name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
