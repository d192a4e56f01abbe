"""vLLM's CPU build, on the bundled model. Run by `make test-vllm`; elsewhere these tests are skipped as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.vllm.backend import VllmBackend
from tests.backends.token_engines import mark

SETTINGS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "dtype": "float32",
    "enforce_eager": True,
    "skip_mm_profiling": True,
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.05,
}
LIMIT = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, Path(__file__).parent, "vllm", ("vllm",), "vLLM is not installed: make test-vllm")


@pytest.fixture(scope="module")
def engine(loop: asyncio.AbstractEventLoop) -> Iterator[VllmBackend]:
    """One open engine for all tests of a module, which lets a request have `LIMIT` pictures."""
    backend = VllmBackend(**SETTINGS, limit_mm_per_prompt={"image": LIMIT})
    loop.run_until_complete(backend.open())
    yield backend
    loop.run_until_complete(backend.aclose())
