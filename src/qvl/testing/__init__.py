"""What the tests of qvl are made of, for the tests of adapters that others write.

`BackendContract` and `CacheContract` are pytest suites: inherit, name your adapter in one fixture, run. The rest are
real, small implementations to test programs with: backends that echo and record, and a scripted HTTP endpoint.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qvl.testing.asking import Sight
    from qvl.testing.backend_contract import BackendContract
    from qvl.testing.cache_contract import CacheContract
    from qvl.testing.endpoint import ScriptedEndpoint
    from qvl.testing.recording import EchoBackend, RecordingBackend

__all__ = ["BackendContract", "CacheContract", "EchoBackend", "RecordingBackend", "ScriptedEndpoint", "Sight"]

_HOMES: Final = {
    "BackendContract": "backend_contract",
    "CacheContract": "cache_contract",
    "EchoBackend": "recording",
    "RecordingBackend": "recording",
    "ScriptedEndpoint": "endpoint",
    "Sight": "asking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
