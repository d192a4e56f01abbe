"""Options that may be repeated, read into what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qvl.errors import ConfigError


def listed(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return all values; one may hold several, with commas between."""
    return tuple(part.strip() for part in ",".join(values or ()).split(",") if part.strip())


def backend_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Return the NAME=VALUE pairs of `--option` by name, values read as JSON where they are.

    Raises:
        ConfigError: one of them has no name.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--option {pair!r} is not NAME=VALUE", hint="--option max_retries=3")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
