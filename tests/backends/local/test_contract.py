"""The local backend keeps what every backend promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.testing import Sight
from qvl.testing.backend_contract import BackendContract
from tests.backends.bundled import sight as bundled_sight


class TestLocal(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20)

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight | None:
        return bundled_sight()
