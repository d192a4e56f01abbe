"""Types that contain a `typing.TypedDict`: before Python 3.12, pydantic supports only those of typing_extensions."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import operator
import sys
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Final, TypeGuard

import typing_extensions
from pydantic import AfterValidator

_QUALIFIERS: Final = tuple(
    getattr(module, name)
    for module in (typing, typing_extensions)
    for name in ("NotRequired", "Required", "ReadOnly")
    if hasattr(module, name)
)
_HOLDERS: Final = ("builtins", "collections", "collections.abc")


def portable(hint: object) -> Any:
    """Return `hint` with its TypedDicts replaced by ones that pydantic supports; values validate to the same types."""
    return hint if sys.version_info >= (3, 12) or not _holds_one(hint, []) else _made(hint, {})


def _holds_one(hint: object, parents: list[object]) -> bool:
    """True if `hint` contains a TypedDict of `typing`, at any depth."""
    if any(one is hint for one in parents):
        return False
    if typing_extensions.is_typeddict(hint) and type(hint).__module__ == "typing":
        return True
    if _is_plain_dataclass(hint):
        # Until it has been read, one that leads back to itself adds nothing.
        return any(_holds_one(inner, [*parents, hint]) for inner in _fields_of(hint).values())
    if typing_extensions.is_typeddict(hint):
        return any(_holds_one(inner, [*parents, hint]) for inner in _hints_of(hint).values())
    return any(_holds_one(inner, parents) for inner in typing.get_args(hint))


def _made(hint: object, known: dict[object, object]) -> object:
    """`hint` rebuilt with supported TypedDicts; `known` maps classes to their copies, unfinished ones included."""
    if isinstance(hint, type) and hint in known:
        return known[hint]
    if isinstance(hint, type) and typing_extensions.is_typeddict(hint):
        return _typed_dict(hint, known)
    if _is_plain_dataclass(hint) and _holds_one(hint, []):
        return _dataclass(hint, known)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return Annotated[(_made(inner[0], known), *inner[1:])]
    if origin is None or not inner:
        return hint
    if origin in _QUALIFIERS:
        return origin[_made(inner[0], known)]
    if origin in (typing.Union, UnionType):
        return functools.reduce(operator.or_, (_made(one, known) for one in inner))
    if origin.__module__ in _HOLDERS and origin is not collections.abc.Callable:
        return origin[tuple(_made(one, known) if one is not ... else one for one in inner)]
    return hint


def _typed_dict(hint: type, known: dict[object, object]) -> object:
    hints = _hints_of(hint)
    optional: frozenset[str] = getattr(hint, "__optional_keys__", frozenset())
    make: Any = typing_extensions.TypedDict  # a call with a name that is known only now
    made = make(hint.__name__, dict.fromkeys(hints, Any))
    made.__doc__ = hint.__doc__
    if hasattr(hint, "__pydantic_config__"):
        made.__pydantic_config__ = hint.__pydantic_config__
    known[hint] = made
    for name, inner in hints.items():
        one = _made(inner, known)
        marked = typing.get_origin(inner) in _QUALIFIERS
        made.__annotations__[name] = typing_extensions.NotRequired[one] if name in optional and not marked else one
    return made


def _dataclass(hint: type, known: dict[object, object]) -> object:
    """A copy of the dataclass `hint` with rebuilt field types; validated instances are converted back to `hint`."""
    fields = [one for one in dataclasses.fields(hint) if one.init]
    twin: Any = dataclasses.make_dataclass(
        hint.__name__,
        [
            (
                one.name,
                Any,
                dataclasses.field(default=one.default, default_factory=one.default_factory, metadata=one.metadata),
            )
            for one in fields
        ],
        kw_only=True,
    )
    if hint.__doc__ is not None and not hint.__doc__.startswith(f"{hint.__name__}("):
        twin.__doc__ = hint.__doc__
    if hasattr(hint, "__pydantic_config__"):
        twin.__pydantic_config__ = hint.__pydantic_config__

    def original(instance: object) -> object:
        return hint(**{one.name: getattr(instance, one.name) for one in fields})

    known[hint] = Annotated[twin, AfterValidator(original)]
    hints = _fields_of(hint)
    for one in fields:
        kind = _made(hints[one.name], known)
        twin.__annotations__[one.name] = twin.__dataclass_fields__[one.name].type = kind
    return known[hint]


def _is_plain_dataclass(hint: object) -> TypeGuard[type]:
    """True for a standard dataclass; pydantic's own have built their schema already."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and not hasattr(hint, "__pydantic_validator__")


def _hints_of(hint: object) -> Mapping[str, object]:
    return typing_extensions.get_type_hints(hint, include_extras=True)


def _fields_of(hint: object) -> Mapping[str, object]:
    """The field types of a dataclass; {} if they cannot be resolved or its __init__ takes other arguments."""
    try:
        hints = _hints_of(hint)
    except NameError:
        return {}
    return {} if any(isinstance(inner, dataclasses.InitVar) for inner in hints.values()) else hints
