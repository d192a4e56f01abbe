"""OpenAI-compatible endpoints, and pools of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.backends.openai.backend import OpenAIBackend

__all__ = ["OpenAIBackend"]
__getattr__ = lazy(__name__, {".backend": ("OpenAIBackend",)})
