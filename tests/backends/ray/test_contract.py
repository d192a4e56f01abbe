"""Replicas under Ray keep what every backend promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qvl.backends.base import Backend
from qvl.testing import BackendContract, EchoBackend, Sight
from tests.backends.test_contract import coloured

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class TestRay(BackendContract):
    patience = 300.0

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return coloured()

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls, cluster: Any) -> Callable[[], Backend]:
        from qvl.backends.ray.backend import RayBackend

        return lambda: RayBackend(
            make=partial(EchoBackend, pause=0.002),
            replicas=2,
            devices="cpu",
            cpus_per_replica=0.5,
            ray_address=cluster.address,
        )
