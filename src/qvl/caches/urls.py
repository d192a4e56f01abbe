"""Parses the options of cache URLs by their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, quote

from qvl.errors import ConfigError
from qvl.types import JsonMapping, JsonObject

# Raises ValueError with the form of a valid value, which becomes the hint: "write a whole number".
Reader: TypeAlias = Callable[[str], object]

_UNITS: Final = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size(text: str) -> int:
    """Return a number of bytes, from a plain number or one with a unit such as `512MiB`, `64k`, `2GB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise ValueError("a size such as 1048576 or 512MiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def count(text: str) -> int:
    """Return the whole number in `text`."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def seconds(text: str) -> float:
    """Return the seconds in `text`, such as `0.5` or `0.5s`."""
    try:
        return float(text.strip().removesuffix("s"))
    except ValueError:
        raise ValueError("a number of seconds") from None


def flag(text: str) -> bool:
    """Return True for 1, true, yes or on, False for 0, false, no or off."""
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError("yes or no")


def read_options(
    name: str, query: str, named: JsonMapping, known: Mapping[str, Reader], *, passed: tuple[str, ...] = ()
) -> JsonObject:
    """Return the parsed options of a cache URL; keyword arguments (`named`) override those in the `query`.

    `passed` are names of options that only a program can pass, such as a clock.

    Raises:
        ConfigError: the cache `name` has no such option, or the value is invalid.
    """
    options: JsonObject = {}
    for key, value in [*parse_qsl(query, keep_blank_values=True), *named.items()]:
        if key in passed and key in named:
            options[key] = value
        elif key not in known:
            raise ConfigError(
                f"the {name} cache has no option {key!r}", hint=f"it has {', '.join(sorted(known))}", param=key
            )
        elif isinstance(value, str):
            try:
                options[key] = known[key](value)
            except ValueError as exc:
                raise ConfigError(f"invalid {key}={value!r} in a {name} URL", hint=f"write {exc}", param=key) from exc
        else:
            options[key] = value
    return options


def path_url(path: str) -> str:
    """Return the `sqlite:` URL of a file path, relative or absolute."""
    return "sqlite:///" + quote(path.replace("\\", "/"), safe="/:~")
