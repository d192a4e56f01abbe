"""Whoever opens closes: what a pipeline ends with itself, what it leaves to its user, and how long it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.caches.memory import MemoryCache
from qvl.pipeline import executor as answering
from qvl.plugins.hookspecs import hookimpl

from .conftest import TalkingBackend


class NotedCache(MemoryCache):
    """Counts how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


class NotedPlugin:
    """Makes `noted:` a cache URL, and keeps what was made."""

    def __init__(self) -> None:
        self.made: list[NotedCache] = []

    @hookimpl
    def register_caches(self, register: Callable[[str, Any], None]) -> None:
        def make(url: str) -> NotedCache:
            self.made.append(NotedCache())
            return self.made[-1]

        register("noted", make)


@pytest.mark.parametrize("used", [True, False])
def test_a_cache_instance_stays_open_and_can_be_shared(picture: Image.Image, used: bool) -> None:
    cache = NotedCache()
    with Pipeline(backend=TalkingBackend(), cache=cache) as first, Pipeline(backend=TalkingBackend(), cache=cache):
        if used:
            assert first.ask(picture, "q").cache == "miss"
    Pipeline(backend=TalkingBackend(), cache=cache).close()
    assert cache.closed == 0
    with Pipeline(backend=TalkingBackend(), cache=cache) as second:
        assert second.ask(picture, "q").cache == ("hit" if used else "miss")


@pytest.mark.parametrize("used", [True, False])
def test_a_cache_that_the_pipeline_opened_is_closed_with_it(picture: Image.Image, used: bool) -> None:
    plugin = NotedPlugin()
    pipe = Pipeline(backend=TalkingBackend(), cache="noted:", plugins=[plugin])
    if used:
        pipe.ask(picture, "q")
    pipe.close()
    assert [cache.closed for cache in plugin.made] == [1]


def test_a_backend_instance_is_opened_and_closed_by_its_pipeline(picture: Image.Image) -> None:
    backend = TalkingBackend()
    with Pipeline(backend=backend, cache="off") as pipe:
        pipe.ask(picture, "q")
    assert (backend.opened, backend.closed) == (1, 1)


class Clinging(TalkingBackend):
    """Does not close, and, if `stubborn`, not even when it is told to stop."""

    def __init__(self, *, stubborn: bool) -> None:
        super().__init__()
        self.stubborn = stubborn
        self.may_end = asyncio.Event()

    async def aclose(self) -> None:
        while True:
            try:
                await self.may_end.wait()
                return
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise


def test_a_backend_that_does_not_close_is_left_behind(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answering, "CLOSE_SECONDS", 0.05)

    async def main() -> None:
        plugin, backend = NotedPlugin(), Clinging(stubborn=True)
        pipe = AsyncPipeline(backend=backend, cache="noted:", plugins=[plugin])
        await pipe.ask(picture, "q")
        await asyncio.wait_for(pipe.aclose(), 30)
        assert plugin.made[0].closed == 1
        backend.may_end.set()

    asyncio.run(main())
    with Pipeline(backend=Clinging(stubborn=False), cache="off") as pipe:
        pipe.ask(picture, "q")
    assert caplog.text.count("abandoned") == 2


class Failing(TalkingBackend):
    async def aclose(self) -> None:
        raise RuntimeError("the device hangs")


def test_a_backend_that_fails_to_close_does_not_keep_the_cache_open(picture: Image.Image) -> None:
    plugin = NotedPlugin()
    pipe = Pipeline(backend=Failing(), cache="noted:", plugins=[plugin])
    pipe.ask(picture, "q")
    with pytest.raises(RuntimeError, match="the device hangs"):
        pipe.close()
    assert plugin.made[0].closed == 1
