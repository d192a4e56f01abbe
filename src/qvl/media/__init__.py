"""The media gate: any source becomes one checked Picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.media.gate import aload, aready, is_remote, load, ready
    from qvl.media.picture import Picture, PictureSource
    from qvl.media.policy import DEFAULT_POLICY, MediaPolicy

__all__ = ["DEFAULT_POLICY", "MediaPolicy", "Picture", "PictureSource", "aload", "aready", "is_remote", "load", "ready"]
__getattr__ = lazy(
    __name__,
    {
        ".gate": ("aload", "aready", "is_remote", "load", "ready"),
        ".picture": ("Picture", "PictureSource"),
        ".policy": ("DEFAULT_POLICY", "MediaPolicy"),
    },
)
