"""Any sequence of calls leaves a cache as it would leave a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qvl.caches.base import Cache, CacheEntry, Lease
from qvl.caches.memory import MemoryCache
from qvl.caches.sqlite import SqliteCache
from qvl.caches.tiered import TieredCache

KEYS = st.sampled_from(["a", "b", "sha256:c", "ключ", "*"])
LANGUAGES = st.sampled_from(["en", "zh", ""])
MODELS = st.sampled_from(["tiny", "big"])


class CacheModel(RuleBasedStateMachine):
    """`stored` is what must be there; the clock moves only by a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_700_000_000.0
        self.folder = Path(tempfile.mkdtemp())
        self.stored: dict[str, CacheEntry] = {}
        self.leases: dict[str, Lease] = {}
        self.last_token = 0
        self.cache = self.make()

    def make(self) -> Cache:
        return MemoryCache(clock=lambda: self.now)

    def teardown(self) -> None:
        self.cache.close()
        shutil.rmtree(self.folder)

    def live(self) -> dict[str, CacheEntry]:
        return {key: found for key, found in self.stored.items() if not found.expired(self.now)}

    @rule(
        key=KEYS,
        language=LANGUAGES,
        model=MODELS,
        text=st.text(st.characters(codec="utf-8"), max_size=20),
        ttl=st.none() | st.sampled_from([5.0, 50.0, 0.0]),
    )
    def set(self, key: str, language: str, model: str, text: str, ttl: float | None) -> None:
        made = CacheEntry(
            result={"text": text},
            language=language,
            model=model,
            text=text,
            created_at=self.now,
            analysis={"brand": text},
        )
        self.cache.set(key, made, ttl=ttl)
        self.stored[key] = replace(made, expires_at=None if ttl is None else self.now + ttl)

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        assert self.cache.get(key) == self.live().get(key)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        assert self.cache.delete(key) == (key in self.live())
        self.stored.pop(key, None)

    @rule(language=st.none() | LANGUAGES, model=st.none() | MODELS, older_than=st.none() | st.sampled_from([1.0, 20.0]))
    def clear(self, language: str | None, model: str | None, older_than: float | None) -> None:
        def goes(found: CacheEntry) -> bool:
            return (
                language in (None, found.language)
                and model in (None, found.model)
                and (older_than is None or found.created_at < self.now - older_than)
            )

        gone = [key for key, found in self.live().items() if goes(found)]
        filters: dict[str, Any] = {"language": language, "model": model, "older_than": older_than}
        assert self.cache.clear(**filters) == len(gone)
        self.stored = {key: found for key, found in self.live().items() if key not in gone}

    @rule(seconds=st.sampled_from([0.5, 7.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=KEYS, ttl=st.sampled_from([3.0, 30.0]))
    def lease(self, key: str, ttl: float) -> None:
        held = self.leases.get(key)
        got = self.cache.lease(key, ttl)
        if held is not None and held.expires_at > self.now:
            assert got is None
        else:
            assert got is not None
            assert got.token > self.last_token
            assert got.expires_at == self.now + ttl
            self.last_token = got.token
            self.leases[key] = got

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.leases)))
        self.cache.release(self.leases.pop(key))

    @invariant()
    def what_is_listed_is_what_is_stored(self) -> None:
        assert dict(self.cache.items()) == self.live()
        assert self.cache.stats().entries == len(self.live())


class SqliteModel(CacheModel):
    def make(self) -> Cache:
        return SqliteCache(self.folder / "cache.db", clock=lambda: self.now)

    @rule()
    def reopen(self) -> None:
        self.cache.close()
        self.cache = self.make()


class TieredModel(CacheModel):
    def make(self) -> Cache:
        return TieredCache(MemoryCache(clock=lambda: self.now), front_ttl=10.0, clock=lambda: self.now)


_settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMemoryModel = CacheModel.TestCase
TestSqliteModel = SqliteModel.TestCase
TestTieredModel = TieredModel.TestCase
for _case in (TestMemoryModel, TestSqliteModel, TestTieredModel):
    _case.settings = _settings
del _case
