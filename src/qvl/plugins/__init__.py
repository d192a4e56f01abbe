"""Names of backends and caches, from built-ins and installed packages alike. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.plugins.host import (
        EXTRAS,
        GROUP,
        BuiltIns,
        Factory,
        PluginFailure,
        PluginHost,
        Registry,
        nearest,
        refuse_unknown_options,
        resolve,
        split_model,
    )

_HOME = {
    "BuiltIns": "host",
    "EXTRAS": "host",
    "Factory": "host",
    "GROUP": "host",
    "PluginFailure": "host",
    "PluginHost": "host",
    "Registry": "host",
    "nearest": "host",
    "refuse_unknown_options": "host",
    "resolve": "host",
    "split_model": "host",
}

__all__ = [
    "EXTRAS",
    "GROUP",
    "BuiltIns",
    "Factory",
    "PluginFailure",
    "PluginHost",
    "Registry",
    "nearest",
    "refuse_unknown_options",
    "resolve",
    "split_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
