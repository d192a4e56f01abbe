"""The vLLM backend keeps what every backend promises, with the real engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qvl.backends.base import Backend
from qvl.backends.vllm.backend import VllmBackend
from qvl.testing import BackendContract, Sight
from tests.backends import bundled
from tests.backends.vllm.conftest import SETTINGS


class TestVllm(BackendContract):
    patience = 500.0

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: VllmBackend(**SETTINGS)

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return bundled.sight()
