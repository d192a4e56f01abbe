"""Sharing one piece of work: who comes, who leaves, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline
from qvl.backends.base import CUT_OFF
from qvl.caches.base import Lease
from qvl.caches.memory import MemoryCache
from qvl.errors import BackendError, BackendResponseError, BackendUnavailableError
from qvl.pipeline.call import ChatCall
from qvl.types import ChatRequest, Chunk

from .conftest import TalkingBackend, answer_json, answering, followers, until


class Reluctant(TalkingBackend):
    """Takes its time to end when it is told to stop, and may fail while it does."""

    def __init__(self, *, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing
        self.stopping = asyncio.Event()
        self.may_stop = asyncio.Event()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        try:
            async for chunk in super().stream(request):
                yield chunk
        except asyncio.CancelledError:
            self.stopping.set()
            await self.may_stop.wait()
            if self.failing:
                raise BackendUnavailableError("lost on the way out") from None
            raise


def test_who_comes_while_a_given_up_answer_is_being_stopped_gets_one_of_their_own(picture: Image.Image) -> None:
    async def main() -> None:
        backend = Reluctant()
        backend.gate = asyncio.Event()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            first = asyncio.create_task(pipe.ask(picture, "q"))
            await until(lambda: backend.running)
            first.cancel()
            await backend.stopping.wait()
            second = asyncio.create_task(pipe.ask(picture, "q"))
            await asyncio.sleep(0.02)
            backend.gate.set()
            backend.may_stop.set()
            assert (await second).text == "1:q"

    asyncio.run(main())


@pytest.mark.parametrize("streaming", [False, True])
def test_nobody_is_told_twice_of_an_error_that_nobody_waits_for(picture: Image.Image, streaming: bool) -> None:
    complaints: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        backend = Reluctant(failing=True)
        backend.gate = asyncio.Event()
        async with AsyncPipeline(backend=backend, cache="off") as pipe:

            async def consume() -> None:
                async for _ in pipe.stream(picture, "q"):
                    pass

            task = asyncio.create_task(consume() if streaming else pipe.ask(picture, "q"))
            await until(lambda: backend.running)
            backend.may_stop.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            gc.collect()

    asyncio.run(main())
    assert complaints == []


def test_work_that_is_given_up_before_it_began_leaves_nothing_behind(picture: Image.Image) -> None:
    async def main() -> None:
        async with AsyncPipeline(backend=TalkingBackend(), cache=MemoryCache()) as pipe:
            streaming = await pipe.executor.start(ChatCall([{"role": "user", "content": "q"}], None, {}))
            items = asyncio.ensure_future(anext(streaming.items))
            await asyncio.sleep(0)
            items.cancel()
            await asyncio.gather(items, return_exceptions=True)
            assert pipe.stats()["num_flights"] == 0

    asyncio.run(main())


def test_closing_the_pipeline_ends_what_is_under_way_with_an_error(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        backend.gate = asyncio.Event()
        pipe = AsyncPipeline(backend=backend, cache="memory:")
        tasks = [asyncio.create_task(pipe.ask(picture, "q", cache=mode)) for mode in ("auto", "auto", "off")]
        # The one that shares an answer as well: who comes after the closing begins anew.
        await until(lambda: backend.running == 2 and followers(pipe) == 2)
        assert pipe.stats()["num_flights"] == 2
        await pipe.aclose()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(item, BackendError) for item in found), found
        assert (backend.running, pipe.stats()["num_flights"]) == (0, 0)

    asyncio.run(main())


def test_who_wants_a_new_answer_does_not_share_one_that_may_come_from_the_cache(picture: Image.Image) -> None:
    async def main() -> None:
        backend = TalkingBackend()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            backend.gate = asyncio.Event()
            plain = asyncio.create_task(pipe.ask(picture, "q"))
            await until(lambda: backend.running)
            fresh = asyncio.create_task(pipe.ask(picture, "q", cache="refresh"))
            await asyncio.sleep(0.02)
            backend.gate.set()
            assert [(await plain).cache, (await fresh).cache] == ["miss", "miss"]
        assert len(backend.requests) == 2

    asyncio.run(main())


class CutOff(TalkingBackend):
    """Ends without a finish_reason, as when a connection drops and nobody says so."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        yield Chunk(text="half an ans")


def test_an_answer_that_was_cut_off_is_not_kept(picture: Image.Image) -> None:
    async def main() -> None:
        backend = CutOff()
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            assert [(await pipe.ask(picture, "q")).cache for _ in range(2)] == ["miss", "miss"]

    asyncio.run(main())


class Slow(MemoryCache):
    """Grants a lease after a while, and remembers those that were not given back."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def lease(self, key: str, ttl: float) -> Lease | None:
        self.asked.set()
        self.go_on.wait(30)
        return super().lease(key, ttl)


def test_a_lease_that_comes_too_late_is_given_back(picture: Image.Image) -> None:
    async def main() -> None:
        cache = Slow()
        async with AsyncPipeline(backend=TalkingBackend(), cache=cache) as pipe:
            task = asyncio.create_task(pipe.ask(picture, "q"))
            await until(cache.asked.is_set)
            task.cancel()
            await asyncio.sleep(0.02)
            cache.go_on.set()
            await asyncio.gather(task, return_exceptions=True)
            assert (await pipe.ask(picture, "q")).cache == "miss"
            assert len(cache._lease_table) == 0

    asyncio.run(asyncio.wait_for(main(), 30))


class Dropping(TalkingBackend):
    """Loses the connection after its first words, as many times as `drops` says."""

    def __init__(self, drops: int, *, code: str | None = CUT_OFF, **options: Any) -> None:
        super().__init__(**options)
        self.drops = drops
        self.code = code
        self.noticed: Callable[[], bool] = lambda: True

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        if self.drops:
            self.drops -= 1
            self.requests.append(request)
            yield Chunk(text="lost ")
            yield Chunk(text="words ")
            await until(self.noticed)
            raise BackendResponseError("the connection broke off", code=self.code)
        async for chunk in super().stream(request):
            yield chunk


def test_an_answer_cut_off_before_anybody_saw_it_is_asked_for_once_more(picture: Image.Image) -> None:
    async def main() -> None:
        backend = Dropping(1)
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            assert (await pipe.ask(picture, "q")).text == "1:q"
            assert len(backend.requests) == 2
            backend.drops = 1
            found = await pipe.chat([{"role": "user", "content": "hello"}])
            assert found.text == "0:hello"
            backend.drops = 2
            with pytest.raises(BackendResponseError, match="broke off"):
                await pipe.ask(picture, "q")
            assert len(backend.requests) == 6
            backend.drops, backend.code = 1, None
            with pytest.raises(BackendResponseError, match="broke off"):
                await pipe.ask(picture, "q")

    asyncio.run(main())


def test_an_analysis_cut_off_is_asked_for_once_more_each_time_it_is_asked(picture: Image.Image) -> None:
    async def main() -> None:
        backend = Dropping(1, reply=answering("no JSON", answer_json()))
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            assert (await pipe.analyze(picture)).brand == "NORVIK"
        # Cut off, nonsense, and the answer.
        assert len(backend.requests) == 3

    asyncio.run(main())


def test_a_stream_that_was_shown_is_not_begun_again(picture: Image.Image) -> None:
    async def main() -> None:
        backend = Dropping(1)
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            seen: list[str] = []
            backend.noticed = lambda: len(seen) == 2

            async def consume() -> None:
                async for chunk in pipe.stream(picture, "q"):
                    seen.append(chunk.text)

            with pytest.raises(BackendResponseError, match="broke off"):
                await consume()
            assert seen == ["lost ", "words "]
            assert len(backend.requests) == 1

    asyncio.run(main())


def test_who_streams_what_another_asked_for_sees_none_of_what_was_lost(picture: Image.Image) -> None:
    async def main() -> None:
        backend = Dropping(1)
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            asked = asyncio.create_task(pipe.ask(picture, "one two"))
            await until(lambda: len(backend.requests) == 2)
            streamed = "".join([chunk.text async for chunk in pipe.stream(picture, "one two")])
            assert streamed == (await asked).text == "1:one two"

    asyncio.run(main())
