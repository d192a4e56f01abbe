"""Datasets under Ray Data: input order, errors as items, nothing computed twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.errors import ConfigError, MediaError
from qvl.testing import EchoBackend
from qvl.testing.echo import COLOURS
from tests.backends.ray.engines import Plugin

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NAMES = ("red", "green", "blue", "white")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """40 pictures, no two alike, and a place for notes beside them."""
    found = []
    for number in range(40):
        path = tmp_path / f"{number:02}.png"
        Image.new("RGB", (32 + number, 64), COLOURS[NAMES[number % len(NAMES)]]).save(path)
        found.append(path)
    (tmp_path / "notes").mkdir()
    return found


@pytest.fixture
def ask(cluster: Any, tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a map with a pipeline of its own, as another program on the same cache would."""

    def run(sources: list[Any], **more: Any) -> list[Any]:
        with Pipeline(
            "counted:one",
            plugins=[Plugin()],
            cache=str(tmp_path / "answers.db"),
            notes=str(tmp_path / "notes"),
            concurrency=4,
            device="cpu",
        ) as pipeline:
            more = {"replicas": 2, "ray_address": cluster.address, **more}
            return list(pipeline.map(sources, "Name the colour.", engine="ray", **more))

    return run


def answered(tmp_path: Path) -> list[tuple[str, str]]:
    notes = (path.read_text().split() for path in (tmp_path / "notes").glob("answer-*"))
    return [(pid, picture) for pid, picture in notes]


def test_input_order_errors_as_items_and_both_actors_work(ask: Any, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes" / "wait-for-two").touch()
    sources = [*pictures[:20], str(tmp_path / "lost.png"), pictures[20].read_bytes(), *pictures[21:]]
    items = ask(sources)
    assert [item.index for item in items] == list(range(41))
    assert [item.source for item in items] == sources
    wrong = items.pop(20)
    assert isinstance(wrong.error, MediaError)
    assert [NAMES[number % 4] in item.value.text for number, item in enumerate(items)] == [True] * 40
    assert {item.result.cache for item in items} == {"miss"}
    assert all(not item.result.pictures for item in items)
    assert len({pid for pid, _ in answered(tmp_path)}) == 2


def test_a_second_run_computes_only_what_is_missing(ask: Any, pictures: list[Path], tmp_path: Path) -> None:
    assert len(ask(pictures[:25])) == 25
    items = ask(pictures)
    assert [item.result.cache for item in items] == ["hit"] * 25 + ["miss"] * 15
    assert len({picture for _, picture in answered(tmp_path)}) == len(answered(tmp_path)) == 40


def test_an_actor_that_is_killed_costs_no_answer_that_was_given(ask: Any, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes" / "kill-once").touch()
    items = ask(pictures)
    assert not (tmp_path / "notes" / "kill-once").exists()
    assert all(item.ok for item in items)
    assert [item.index for item in items] == list(range(40))
    found = answered(tmp_path)
    assert len({picture for _, picture in found}) == 40
    # What was under way when the process ended is answered again; what it had handed over is not.
    assert len(found) - 40 <= 8
    assert len({pid for pid, _ in found}) == 3


def test_a_map_that_is_left_early_ends(ask: Any, cluster: Any, pictures: list[Path], tmp_path: Path) -> None:
    with Pipeline("counted:one", plugins=[Plugin()], cache="off", notes=str(tmp_path / "notes"), pause=0.05) as pipe:
        for item in pipe.map(pictures, "What?", engine="ray", replicas=1, ray_address=cluster.address, concurrency=2):
            assert item.index == 0
            break
    assert len(answered(tmp_path)) < 40
    assert len(ask(pictures[:2], replicas=1)) == 2


def test_a_map_that_is_cancelled_leaves_the_cluster(cluster: Any, pictures: list[Path], tmp_path: Path) -> None:
    import ray

    async def run() -> None:
        notes = tmp_path / "notes"
        async with AsyncPipeline("counted:one", plugins=[Plugin()], cache="off", notes=str(notes), pause=0.5) as pipe:
            found = pipe.map(pictures, "What?", engine="ray", replicas=1, ray_address=cluster.address, concurrency=2)
            # The two of a batch, and a third that is waited for.
            await anext(found)
            await anext(found)
            third = asyncio.ensure_future(anext(found))
            await asyncio.sleep(0.1)
            third.cancel()
            with pytest.raises(asyncio.CancelledError):
                await third

    # Ends when all of its threads have.
    asyncio.run(run())
    assert not ray.is_initialized()
    assert len(answered(tmp_path)) < 40


def test_a_map_that_is_cancelled_while_it_joins_leaves_the_cluster(
    cluster: Any, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from qvl.backends.ray import cluster as ours

    joins, goes_on, known = threading.Event(), threading.Event(), ours.join

    def slow(address: str | None) -> None:
        joins.set()
        goes_on.wait()
        known(address)

    monkeypatch.setattr(ours, "join", slow)

    async def run() -> None:
        notes = str(tmp_path / "notes")
        async with AsyncPipeline("counted:one", plugins=[Plugin()], cache="off", notes=notes) as pipe:
            found = pipe.map(pictures, "What?", engine="ray", replicas=1, ray_address=cluster.address)
            first = asyncio.ensure_future(anext(found))
            await asyncio.to_thread(joins.wait)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            goes_on.set()

    # Ends when all of its threads have.
    asyncio.run(run())
    assert not ray.is_initialized()
    assert not answered(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_typed_analyses_of_the_bundled_model(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    # One of the two is what the processes of the cluster would not choose by themselves.
    for name in ("known_dtype", "faster_dtype"):
        monkeypatch.setattr(f"qvl.backends.local.model.device.{name}", lambda: dtype)
    found = sorted((Path(__file__).parents[3] / "examples" / "pictures").glob("*-*-*.*"))[:3]
    with Pipeline(cache=str(tmp_path / "a.db"), device="cpu") as pipeline:
        items = list(pipeline.map(found, engine="ray", replicas=1, ray_address=cluster.address))
        for path, item in zip(found, items, strict=True):
            assert item.value.brand.lower() == path.stem.split("-")[0]
        # The key is the same with Ray and without.
        assert [item.result.cache for item in pipeline.map(found)] == ["hit"] * len(found)


def test_what_cannot_work_is_said_in_one_line(cluster: Any, tmp_path: Path, pictures: list[Path]) -> None:
    with (
        Pipeline(backend=EchoBackend(), cache="off") as pipe,
        pytest.raises(ConfigError, match="cannot send a backend instance"),
    ):
        list(pipe.map(pictures, "What?", engine="ray"))
    with Pipeline("counted:x", plugins=[Plugin()], notes=str(tmp_path), cache="off") as pipe:
        for wrong, match in (
            ({"engine": "dask"}, "unknown map engine 'dask'"),
            ({"replicas": 2}, "for engine='ray'"),
            ({"engine": "ray", "replicas": 0}, "replicas=0"),
            ({"engine": "ray", "ray_address": "ray://host:10001"}, "cannot stream"),
        ):
            with pytest.raises(ConfigError, match=match):
                list(pipe.map(pictures, "What?", **wrong))
    # Not by `with`, which would open the model here as well.
    pipe = Pipeline(str(tmp_path / "nowhere"), cache="off", device="cpu")
    with pytest.raises(ConfigError, match="nowhere"):
        list(pipe.map(pictures[:2], "What?", engine="ray", replicas=1, ray_address=cluster.address))
    pipe.close()
