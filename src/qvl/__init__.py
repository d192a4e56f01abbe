"""Qwen3-VL on whatever you have. Names are loaded on first use, so `import qvl` costs next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvl._version import __version__

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import AnalysisResult, ProductAnalysis
    from qvl.backends.base import Backend, Capabilities
    from qvl.caches.base import Cache, CacheEntry, CacheStats, Lease
    from qvl.errors import (
        AnalysisError,
        AuthError,
        BackendError,
        BackendResponseError,
        BackendTimeoutError,
        BackendUnavailableError,
        CacheError,
        ConfigError,
        ContextLengthError,
        DeviceMemoryError,
        EngineDeadError,
        MediaError,
        MissingDependencyError,
        PluginError,
        QvlError,
        RateLimitError,
        RefusalError,
        RequestError,
        UnknownNameError,
        UnsupportedInputError,
    )
    from qvl.media.gate import MediaPolicy, Picture
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.map_in_order import MapItem
    from qvl.pipeline.sync_pipeline import Pipeline
    from qvl.plugins.hookspecs import hookimpl
    from qvl.types import (
        ChatRequest,
        Choice,
        Chunk,
        ImagePart,
        Message,
        ResponseFormat,
        Result,
        SamplingParams,
        TextPart,
        Timing,
        TokenLogprob,
        Tool,
        ToolCall,
        ToolCallDelta,
        Usage,
    )

_HOME = {
    "qvl.analysis": ("AnalysisResult", "ProductAnalysis"),
    "qvl.backends.base": ("Backend", "Capabilities"),
    "qvl.pipeline.sync_pipeline": ("Pipeline",),
    "qvl.caches.base": ("Cache", "CacheEntry", "CacheStats", "Lease"),
    "qvl.errors": (
        "AnalysisError",
        "AuthError",
        "BackendError",
        "BackendResponseError",
        "BackendTimeoutError",
        "BackendUnavailableError",
        "CacheError",
        "ConfigError",
        "ContextLengthError",
        "DeviceMemoryError",
        "EngineDeadError",
        "MediaError",
        "MissingDependencyError",
        "PluginError",
        "QvlError",
        "RateLimitError",
        "RefusalError",
        "RequestError",
        "UnknownNameError",
        "UnsupportedInputError",
    ),
    "qvl.plugins.hookspecs": ("hookimpl",),
    "qvl.pipeline.map_in_order": ("MapItem",),
    "qvl.media": ("MediaPolicy", "Picture"),
    "qvl.pipeline": ("AsyncPipeline",),
    "qvl.types": (
        "ChatRequest",
        "Choice",
        "Chunk",
        "ImagePart",
        "Message",
        "ResponseFormat",
        "Result",
        "SamplingParams",
        "TextPart",
        "Timing",
        "TokenLogprob",
        "Tool",
        "ToolCall",
        "ToolCallDelta",
        "Usage",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AnalysisError",
    "AnalysisResult",
    "AsyncPipeline",
    "AuthError",
    "Backend",
    "BackendError",
    "BackendResponseError",
    "BackendTimeoutError",
    "BackendUnavailableError",
    "Cache",
    "CacheEntry",
    "CacheError",
    "CacheStats",
    "Capabilities",
    "ChatRequest",
    "Choice",
    "Chunk",
    "ConfigError",
    "ContextLengthError",
    "DeviceMemoryError",
    "EngineDeadError",
    "ImagePart",
    "Lease",
    "MapItem",
    "MediaError",
    "MediaPolicy",
    "Message",
    "MissingDependencyError",
    "Picture",
    "Pipeline",
    "PluginError",
    "ProductAnalysis",
    "QvlError",
    "RateLimitError",
    "RefusalError",
    "RequestError",
    "ResponseFormat",
    "Result",
    "SamplingParams",
    "TextPart",
    "Timing",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "UnknownNameError",
    "UnsupportedInputError",
    "Usage",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qvl' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
