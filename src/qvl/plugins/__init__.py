"""Registries of backends, caches and hooks: built-in ones and those of installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.plugins.hookspecs import hookimpl
    from qvl.plugins.host import PluginFailure, PluginHost, Registry

__all__ = ["PluginFailure", "PluginHost", "Registry", "hookimpl"]
__getattr__ = lazy(__name__, {".hookspecs": ("hookimpl",), ".host": ("PluginFailure", "PluginHost", "Registry")})
