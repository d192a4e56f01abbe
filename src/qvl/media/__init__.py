"""The media gate: any source becomes one checked Picture. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.media.gate import (
        DEFAULT_POLICY,
        FORMATS,
        SMALL,
        MediaPolicy,
        Picture,
        PictureSource,
        aload,
        aready,
        is_remote,
        load,
        ready,
    )

_HOME = {
    "DEFAULT_POLICY": "gate",
    "FORMATS": "gate",
    "MediaPolicy": "gate",
    "Picture": "gate",
    "PictureSource": "gate",
    "SMALL": "gate",
    "aload": "gate",
    "aready": "gate",
    "is_remote": "gate",
    "load": "gate",
    "ready": "gate",
}

__all__ = [
    "DEFAULT_POLICY",
    "FORMATS",
    "SMALL",
    "MediaPolicy",
    "Picture",
    "PictureSource",
    "aload",
    "aready",
    "is_remote",
    "load",
    "ready",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
