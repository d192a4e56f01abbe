"""OpenVINO GenAI in this process, for Intel's processors and graphics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.backends.openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
__getattr__ = lazy(__name__, {".backend": ("OpenVinoBackend",)})
