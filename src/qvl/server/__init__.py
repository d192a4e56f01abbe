"""An OpenAI-compatible server over any pipeline: `create_app(pipeline)` to mount it, `qvl-serve` to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.server.app import create_app
    from qvl.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from qvl.server.app import create_app

        return create_app
    if name == "ServerSettings":
        from qvl.server.settings import ServerSettings

        return ServerSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
