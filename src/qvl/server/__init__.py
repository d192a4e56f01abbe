"""An OpenAI-compatible server over any pipeline: `create_app(pipeline)` to mount it, `qvl-serve` to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.server.app import create_app
    from qvl.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
__getattr__ = lazy(__name__, {".app": ("create_app",), ".settings": ("ServerSettings",)})
