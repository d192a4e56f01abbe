"""Replicas that are killed, chosen, drained; what cannot work and how it is said."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qvl import media
from qvl.backends.local.backend import LocalBackend
from qvl.chunks import fold
from qvl.errors import BackendError, BackendUnavailableError, ConfigError, MediaError, UnsupportedInputError
from qvl.media.load_video import load_video
from qvl.media.video_sampling import VideoSampling
from qvl.testing import EchoBackend
from qvl.testing.asking import ask, collect, square
from qvl.tiny import render
from qvl.types import ChatRequest, Message, VideoPart
from tests.backends.lora_files import random_adapter
from tests.backends.ray.engines import DEADLY_SIZE, WHO, Broken, Deadly, Doomed, Marked, Unopenable, Watching
from tests.server.processes import gone
from tests.server.test_dashboard import OF_RAY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
LONG = "Count: " + " ".join(f"number-{n}" for n in range(40))
COLOURS = [(n * 20, 255 - n * 20, n * 7) for n in range(12)]


async def who(backend: Any, *pictures: Any) -> int:
    result = await backend.generate(ask(WHO, *pictures))
    return int(result.text.split()[0])


async def until(found: Any, within: float = 240.0) -> None:
    end = time.monotonic() + within
    while not await found():
        assert time.monotonic() < end
        await asyncio.sleep(0.2)


def test_a_picture_goes_to_the_same_replica_and_different_ones_to_all(opened: Any) -> None:
    backend = opened(make=Marked)
    pictures = [square(colour) for colour in COLOURS]

    async def run() -> list[list[int]]:
        return [await asyncio.gather(*(who(backend, picture) for picture in pictures)) for _ in range(3)]

    first, *others = opened.loop.run_until_complete(run())
    assert others == [first, first]
    assert set(first) == {about.pid for about in backend.replicas()}
    assert len(set(first)) == 2


def test_adapters_by_name_reach_every_replica(opened: Any, tmp_path: Path) -> None:
    adapters = {"shelf": str(random_adapter(tmp_path / "shelf", seed=0))}
    settings = {"dtype": "float32", "batch_invariant": True, "kv_cache_bytes": 16 << 20, "adapter": adapters}
    requests = [
        ask("Describe the product.", media.load(render.sample(seed)[1]), max_tokens=16).replace(adapter=name)
        for seed in range(6000, 6006)
        for name in ("", "shelf")
    ]

    async def answers(backend: Any) -> list[str]:
        assert set(backend.adapters()) == {"shelf"}
        with pytest.raises(UnsupportedInputError, match="has no adapter 'other'"):
            await backend.generate(requests[0].replace(adapter="other"))
        return [result.text for result in await asyncio.gather(*map(backend.generate, requests))]

    async def alone() -> list[str]:
        async with LocalBackend(device="cpu", **settings) as backend:
            return await answers(backend)

    found = opened.loop.run_until_complete(answers(opened(**settings)))
    assert found == opened.loop.run_until_complete(alone())
    assert found[::2] != found[1::2]


def test_a_replica_is_sent_the_frames_of_a_video_and_not_its_file(opened: Any, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the films of the tests are made with it")
    from tests.media.films import film

    part = VideoPart(load_video(film(tmp_path / "clip.mp4"), sampling=VideoSampling(nframes=3)))
    backend = opened(make=Watching)
    answer = opened.loop.run_until_complete(backend.generate(ChatRequest((Message("user", (part,)),))))
    assert answer.text == "3 frames, 0 bytes"
    assert part.video.data


def test_the_series_of_the_dashboard_exist(opened: Any) -> None:
    assert {f"qvl_backend_{name}" for name in opened(make=Marked).stats()} >= OF_RAY


def test_a_killed_replica_loses_no_request_and_another_takes_its_place(opened: Any) -> None:
    backend = opened(make=partial(Marked, pause=0.05))
    requests = [ask(f"{LONG} {n}", square(colour), logprobs=1) for n, colour in enumerate(COLOURS)]

    async def run() -> None:
        alone = EchoBackend()
        await alone.open()
        wanted = [fold(await collect(alone, request), want_logprobs=True)[0] for request in requests]
        victim = await who(backend, square(COLOURS[0]))
        begun = asyncio.Event()
        seen = 0

        async def follow(request: Any) -> Any:
            nonlocal seen
            chunks = []
            async for chunk in backend.stream(request):
                seen += not chunks
                chunks.append(chunk)
                if seen == len(requests):
                    begun.set()
            return fold(chunks, want_logprobs=True)[0]

        asked = [asyncio.ensure_future(follow(request)) for request in requests]
        await begun.wait()
        os.kill(victim, signal.SIGKILL)
        assert await asyncio.gather(*asked) == wanted
        assert backend.stats()["moved_total"] > 0
        # While it is away, the other one answers; then the two share the pictures again.
        assert await who(backend, square(COLOURS[0])) != victim

        async def both() -> bool:
            pids = {await who(backend, request.pictures[0]) for request in requests}
            return len(pids) == 2 and victim not in pids

        await until(both)
        assert backend.unready() is None

    opened.loop.run_until_complete(run())


def test_the_only_replica_is_waited_for(opened: Any) -> None:
    backend = opened(make=partial(Marked, pause=0.02), replicas=1)

    async def run() -> None:
        victim = await who(backend)
        stream = backend.stream(ask(LONG))
        first = await anext(stream)
        os.kill(victim, signal.SIGKILL)
        chunks = [first, *[chunk async for chunk in stream]]
        alone = EchoBackend()
        await alone.open()
        assert fold(chunks)[0][0].text == (await alone.generate(ask(LONG))).text
        assert await who(backend) != victim

    opened.loop.run_until_complete(run())


def test_each_replica_sees_an_npu_of_its_own(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened(make=Marked, devices="npu")
    assert sorted(about.devices["ASCEND_RT_VISIBLE_DEVICES"] for about in backend.replicas()) == ["0", "1"]


def test_fronts_with_the_same_settings_share_replicas_until_the_last_ends(cluster: Any, tmp_path: Any) -> None:
    from qvl.backends.ray.backend import RayBackend

    def make() -> RayBackend:
        return RayBackend(replicas=1, devices="cpu", cpus_per_replica=1, ray_address=cluster.address)

    async def run() -> None:
        first, second = make(), make()
        await first.open()
        await second.open()
        assert [a.pid for a in first.replicas()] == [a.pid for a in second.replicas()]
        assert first.identity()["backend"] == "local"
        await first.aclose()
        assert (await second.generate(ask("hello", max_tokens=2))).usage.completion_tokens > 0
        pid = second.replicas()[0].pid
        await second.aclose()

        async def stopped() -> bool:
            return gone(pid)

        await until(stopped)

    asyncio.run(run())


def test_closing_waits_for_the_question_under_way(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked after the process has left its cluster, Ray would join one again, or start one."""
    import ray

    from qvl.backends.ray import backend
    from qvl.backends.ray import cluster as ours

    asked, goes_on, known = threading.Event(), threading.Event(), ours.head_problem

    def slow() -> str | None:
        asked.set()
        goes_on.wait()
        return known()

    monkeypatch.setattr(backend, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(ours, "head_problem", slow)

    async def run() -> None:
        one = backend.RayBackend(
            make=Marked, replicas=1, devices="cpu", cpus_per_replica=1, ray_address=cluster.address
        )
        await one.open()
        await asyncio.to_thread(asked.wait)
        impatient = asyncio.create_task(one.aclose())
        await asyncio.sleep(0.1)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        assert one.unready() == "closed"
        closing = asyncio.create_task(one.aclose())
        await asyncio.sleep(0.1)
        assert not closing.done()
        goes_on.set()
        await closing
        assert not ray.is_initialized()

    # Ends when all of its threads have.
    asyncio.run(run())
    assert not ray.is_initialized()


@pytest.mark.parametrize("started", [False, True])
def test_an_opening_that_was_given_up_leaves_nothing(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    import ray

    from qvl.backends.ray.backend import RayBackend
    from qvl.backends.ray.deployment import Deployment

    starts, goes_on, known = threading.Event(), threading.Event(), Deployment.about

    def slow(self: Deployment, replicas: int) -> Any:
        starts.set()
        goes_on.wait()
        return known(self, replicas)

    monkeypatch.setattr(Deployment, "about", slow)

    async def run() -> None:
        one = RayBackend(make=Marked, replicas=1, devices="cpu", cpus_per_replica=1, ray_address=cluster.address)
        opening = asyncio.create_task(one.open())
        await asyncio.to_thread(starts.wait)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if started:
            goes_on.set()
            await asyncio.wait(others)
        closing = asyncio.create_task(one.aclose())
        await asyncio.sleep(0.1)
        goes_on.set()
        await closing
        assert not ray.is_initialized()

    asyncio.run(run())
    assert not ray.is_initialized()


def test_an_opening_that_was_given_up_is_taken_over_by_the_next(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from qvl.backends.ray.backend import RayBackend
    from qvl.backends.ray.deployment import Deployment

    starts, known = [], Deployment.start

    def noted(self: Deployment, *args: Any, **settings: Any) -> None:
        starts.append(self.name)
        known(self, *args, **settings)

    monkeypatch.setattr(Deployment, "start", noted)

    async def run() -> None:
        one = RayBackend(make=Marked, replicas=1, devices="cpu", cpus_per_replica=1, ray_address=cluster.address)
        opening = asyncio.create_task(one.open())
        while not starts:
            await asyncio.sleep(0.05)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await one.open()
        assert await who(one) == one.replicas()[0].pid
        await one.aclose()
        assert not ray.is_initialized()

    asyncio.run(run())
    assert len(starts) == 1


def test_an_opening_that_was_given_up_and_failed_is_begun_again(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.backends.ray import backend
    from qvl.backends.ray import cluster as ours

    joins, goes_on, known = threading.Event(), threading.Event(), ours.join

    def unreachable(*_: Any, **__: Any) -> None:
        joins.set()
        goes_on.wait()
        raise BackendUnavailableError("no cluster answers")

    async def run() -> None:
        one = backend.RayBackend(
            make=Marked, replicas=1, devices="cpu", cpus_per_replica=1, ray_address=cluster.address
        )
        monkeypatch.setattr(ours, "join", unreachable)
        opening = asyncio.create_task(one.open())
        await asyncio.to_thread(joins.wait)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        goes_on.set()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
        monkeypatch.setattr(ours, "join", known)
        await one.open()
        assert await who(one) == one.replicas()[0].pid
        await one.aclose()

    asyncio.run(run())


def test_a_replica_that_cannot_be_opened_says_why(opened: Any) -> None:
    with pytest.raises(ConfigError, match=r"the weights are not there \(look in the cellar\)"):
        opened(make=Unopenable)


def test_a_dead_engine_of_a_replica_is_not_the_end_of_its_front(opened: Any) -> None:
    """A server takes EngineDeadError for the end of its own engine, and is not ready from then on."""
    backend = opened(make=Doomed, replicas=1)
    with pytest.raises(BackendUnavailableError, match="the device is lost"):
        opened.loop.run_until_complete(backend.generate(ask("hello")))
    assert backend.lost() is None


def test_a_picture_that_killed_two_replicas_is_refused_and_nobody_else_is(opened: Any, tmp_path: Path) -> None:
    backend = opened(make=Deadly, replicas=3, quarantine=str(tmp_path / "held.json"))
    poison = square((0, 0, 0), DEADLY_SIZE)

    async def run() -> None:
        others = [asyncio.ensure_future(backend.generate(ask(LONG, square(colour)))) for colour in COLOURS]
        await asyncio.sleep(0.1)
        with pytest.raises(MediaError, match="2 engines died while they answered it") as caught:
            await backend.generate(ask("what is it", poison))
        assert caught.value.code == "image_quarantined"
        assert all(result.text for result in await asyncio.gather(*others))
        with pytest.raises(MediaError):
            await backend.generate(ask("and now", poison))
        stats = backend.stats()
        assert (stats["pictures_quarantined"], stats["quarantine_refusals_total"]) == (1, 2)
        assert (await backend.generate(ask("hello", square(COLOURS[0])))).text

    opened.loop.run_until_complete(run())


def test_a_bug_in_a_replica_is_an_error_of_ours(opened: Any) -> None:
    backend = opened(make=Broken)
    with pytest.raises(BackendError, match="KeyError: 'a bug'"):
        opened.loop.run_until_complete(backend.generate(ask("hello")))


def test_more_replicas_than_devices_are_refused(opened: Any) -> None:
    with pytest.raises(ConfigError, match=r"3 replicas need 3 NPU, but \d of the Ray cluster's 2 are free"):
        opened(make=Marked, devices="npu", replicas=3)
