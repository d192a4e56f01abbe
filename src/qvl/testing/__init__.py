"""Contract suites and test backends, for the tests of third-party adapters.

`BackendContract` and `CacheContract` are pytest suites: inherit, name your adapter in one fixture, run. The rest are
real, small implementations to test programs with: backends that echo and record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.testing.asking import Sight
    from qvl.testing.backend_contract import BackendContract
    from qvl.testing.cache_contract import CacheContract
    from qvl.testing.recording import EchoBackend, RecordingBackend

__all__ = ["BackendContract", "CacheContract", "EchoBackend", "RecordingBackend", "Sight"]

__getattr__ = lazy(
    __name__,
    {
        ".backend_contract": ("BackendContract",),
        ".cache_contract": ("CacheContract",),
        ".recording": ("EchoBackend", "RecordingBackend"),
        ".asking": ("Sight",),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
