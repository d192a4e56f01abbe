"""vLLM's engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.backends.vllm.backend import VllmBackend

__all__ = ["VllmBackend"]
__getattr__ = lazy(__name__, {".backend": ("VllmBackend",)})
