"""Parsing of `backend:model` names, and the check of options that a backend or cache takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping

from qvl.errors import ConfigError, UnknownNameError
from qvl.suggest import nearest


def refuse_unknown_options(what: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raise ConfigError for the first option that `factory` does not take."""
    parameters = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            raise ConfigError(f"{what} has no option {name!r}", hint=nearest(name, parameters), param=name)


def split_model(model: str, backends: Iterable[str]) -> tuple[str, str]:
    """Return (backend, model) of `"backend:model"`; a path or hub id without a backend is local.

    Raises:
        UnknownNameError: the prefix is neither a backend nor a Windows drive.
    """
    prefix, colon, rest = model.partition(":")
    if not colon:
        return "local", model
    if prefix in backends:
        return prefix, rest
    if "/" in prefix or "\\" in prefix or (sys.platform == "win32" and len(prefix) == 1):
        return "local", model
    raise UnknownNameError(f"unknown backend {prefix!r} (in {model!r})", hint=nearest(prefix, backends))
