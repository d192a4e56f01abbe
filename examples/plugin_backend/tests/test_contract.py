"""qvl's own contract over this backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from qvl_palette.backend import NAMES, PaletteBackend

from qvl import Backend
from qvl.testing import BackendContract, Sight
from qvl.testing.asking import square


class TestPalette(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: PaletteBackend("16")

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return Sight(
            pictures={name: square(NAMES[name]) for name in ("red", "blue", "yellow")},
            question="Which?",
            names_in=lambda text: [word for word in text.split() if word in NAMES],
        )
