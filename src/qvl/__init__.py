"""Qwen3-VL on CPUs, GPUs, NPUs and endpoints. Names are imported on first use, so that `import qvl` is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy as _lazy
from qvl._version import __version__

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult, ProductAnalysis
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
    from qvl.evidence.located import Locations
    from qvl.evidence.moments import Moment
    from qvl.evidence.shapes import Box, Located, Point
    from qvl.media.picture import Picture
    from qvl.media.policy import MediaPolicy
    from qvl.media.video import Video
    from qvl.media.video_sampling import VideoSampling
    from qvl.pipeline.analyze_frame import analyze_frame
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.map_in_order import MapItem
    from qvl.pipeline.map_results import AsyncMapResults, MapResults
    from qvl.pipeline.read_pages import ReadPage
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
        VideoPart,
    )

__all__ = [
    "AnalysisError",
    "AnalysisResult",
    "AsyncMapResults",
    "AsyncPipeline",
    "AuthError",
    "Backend",
    "BackendError",
    "BackendResponseError",
    "BackendTimeoutError",
    "BackendUnavailableError",
    "Box",
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
    "Located",
    "Locations",
    "MapItem",
    "MapResults",
    "MediaError",
    "MediaPolicy",
    "Message",
    "MissingDependencyError",
    "Moment",
    "Picture",
    "Pipeline",
    "PluginError",
    "Point",
    "ProductAnalysis",
    "QvlError",
    "RateLimitError",
    "ReadPage",
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
    "Video",
    "VideoPart",
    "VideoSampling",
    "__version__",
    "analyze_frame",
    "hookimpl",
]
__getattr__ = _lazy(
    __name__,
    {
        "qvl.analysis.product": ("AnalysisResult", "ProductAnalysis"),
        "qvl.backends.base": ("Backend", "Capabilities"),
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
        "qvl.evidence.located": ("Locations",),
        "qvl.evidence.moments": ("Moment",),
        "qvl.evidence.shapes": ("Box", "Located", "Point"),
        "qvl.media.picture": ("Picture",),
        "qvl.media.policy": ("MediaPolicy",),
        "qvl.media.video": ("Video",),
        "qvl.media.video_sampling": ("VideoSampling",),
        "qvl.pipeline.analyze_frame": ("analyze_frame",),
        "qvl.pipeline.async_pipeline": ("AsyncPipeline",),
        "qvl.pipeline.map_in_order": ("MapItem",),
        "qvl.pipeline.map_results": ("AsyncMapResults", "MapResults"),
        "qvl.pipeline.read_pages": ("ReadPage",),
        "qvl.pipeline.sync_pipeline": ("Pipeline",),
        "qvl.plugins.hookspecs": ("hookimpl",),
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
            "VideoPart",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
