"""Options that may be repeated, read into what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvl.errors import ConfigError

if TYPE_CHECKING:
    import typer


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


def served_names(ctx: typer.Context, values: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names to answer to; the variable MODEL_ID of older scripts is one name, whatever stands in it."""
    own = os.environ.get("MODEL_ID", "").strip()
    named = getattr(ctx.get_parameter_source("served_model_name"), "name", "") in ("COMMANDLINE", "ENVIRONMENT")
    return (own,) if own and not named else listed(values)
