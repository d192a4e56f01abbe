"""The OpenVINO backend keeps what every backend promises, with the real library on the bundled model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qvl.backends.base import Backend
from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.testing import BackendContract, Sight
from tests.backends import bundled
from tests.backends.openvino.conftest import EXACT


class TestOpenVino(BackendContract):
    patience = 300.0

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls, exported: Path) -> Callable[[], Backend]:
        return lambda: OpenVinoBackend(str(exported), **EXACT)

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return bundled.sight()
