"""The contract suite over every cache of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from qvl.caches.memory import MemoryCache
from qvl.caches.sqlite import SqliteCache
from qvl.testing.cache_contract import CacheContract


class TestMemoryCache(CacheContract):
    shared: ClassVar[bool] = False

    @pytest.fixture
    def make_cache(self) -> Callable[[], MemoryCache]:
        return MemoryCache


class TestSqliteCache(CacheContract):
    @pytest.fixture
    def make_cache(self, tmp_path: Path) -> Callable[[], SqliteCache]:
        return lambda: SqliteCache(tmp_path / "cache.db")
