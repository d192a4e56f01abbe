"""The contract suite over every cache of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from qvl.caches.base import Cache
from qvl.caches.memory import MemoryCache
from qvl.caches.redis import open_redis
from qvl.caches.sqlite import SqliteCache
from qvl.caches.tiered import TieredCache
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


class TestRedisCache(CacheContract):
    @pytest.fixture
    def make_cache(self, redis_url: str) -> Callable[[], Cache]:
        return lambda: open_redis(f"{redis_url}?front=0")


class TestTieredCache(CacheContract):
    @pytest.fixture
    def make_cache(self, redis_url: str) -> Callable[[], Cache]:
        return lambda: open_redis(redis_url)


class TestTieredOverSqliteCache(CacheContract):
    @pytest.fixture
    def make_cache(self, tmp_path: Path) -> Callable[[], Cache]:
        return lambda: TieredCache(SqliteCache(tmp_path / "cache.db"))
