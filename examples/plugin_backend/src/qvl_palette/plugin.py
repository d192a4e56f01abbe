"""What qvl loads: hooks, and nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qvl import hookimpl


@hookimpl
def register_backends(register: Callable[[str, Any], None]) -> None:
    register("palette", "qvl_palette.backend:PaletteBackend")
