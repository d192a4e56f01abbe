"""Pipeline and AsyncPipeline, and the implementation of ask, stream, chat, analyze and map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.sync_pipeline import Pipeline

__all__ = ["AsyncPipeline", "Pipeline"]
__getattr__ = lazy(__name__, {".async_pipeline": ("AsyncPipeline",), ".sync_pipeline": ("Pipeline",)})
