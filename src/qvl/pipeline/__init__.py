"""AsyncPipeline and Pipeline: what a user calls, and how one request is answered. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.sync_pipeline import Pipeline

_HOME = {
    "AsyncPipeline": "async_pipeline",
    "Pipeline": "sync_pipeline",
}

__all__ = [
    "AsyncPipeline",
    "Pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
