from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from qvl.backends.local.backend import LocalBackend  # noqa: E402 - skipped without torch
from qvl.backends.local.model.model_folder import bundled_folder  # noqa: E402
from qvl.types import ChatRequest  # noqa: E402
from tests.backends.local import requests  # noqa: E402
from tests.backends.local.checkpoints import random_checkpoint  # noqa: E402
from tests.backends.local.reference import Reference  # noqa: E402


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("random-qwen3-vl"))


@pytest.fixture(scope="session")
def bundled_reference() -> Reference:
    return Reference(bundled_folder())


@pytest.fixture(scope="session")
def random_reference(random_folder: Path) -> Reference:
    return Reference(random_folder)


Opener = Callable[..., LocalBackend]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens LocalBackends on the CPU in float32 and closes them."""
    made: list[LocalBackend] = []

    def open_one(model: object = None, *, kind: type[LocalBackend] = LocalBackend, **settings: object) -> LocalBackend:
        settings = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 64 << 20, **settings}
        backend = kind(None if model is None else str(model), **settings)  # type: ignore[arg-type]
        made.append(backend)
        asyncio.run(backend.open())
        return backend

    yield open_one
    for backend in made:
        asyncio.run(backend.aclose())


@pytest.fixture(scope="session")
def tiny() -> Iterator[LocalBackend]:
    """The bundled model, shared by tests that leave it as they found it."""
    backend = LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20)
    asyncio.run(backend.open())
    yield backend
    asyncio.run(backend.aclose())


@pytest.fixture(scope="session")
def mixed_300() -> list[ChatRequest]:
    return requests.mixed(300, random.Random(7))
