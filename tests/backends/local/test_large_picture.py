"""A picture stalls nobody: it is encoded in slices, between the steps of the others, and its features are the same."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_runner import Runner
from qvl.errors import BackendError, DeviceMemoryError
from qvl.media.gate import load
from qvl.media.picture import Picture
from tests.backends.local.checkpoints import random_checkpoint
from tests.backends.local.reference import Reference
from tests.backends.local.requests import ask, freed, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.backends.local.scheduling.step import Step
    from qvl.backends.local.text.processor import PreparedPicture
    from qvl.types import Result
    from tests.backends.local.conftest import Opener


def large(seed: int = 0, side: int = 512) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return load(Image.fromarray(pixels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("large"), side=512)


class Watched(Runner):
    """Tells what it did, in order: "slice", "begun", or how many answers a step goes on with."""

    events: list[str | int]
    held: threading.Event | None = None
    fails_after: int = 1 << 30
    error: BaseException

    def forward(self, step: Step) -> Any:
        self.events.append(len(step.decode) + sum(not chunk.of_prompt for chunk in step.prefill))
        return super().forward(step)

    def encode(self, pictures: Sequence[PreparedPicture], units: float, grain: float) -> float:
        if self.held is not None and "slice" in self.events:
            assert self.held.wait(60)
        self.events.append("slice")
        if self.events.count("slice") > self.fails_after:
            raise self.error
        return super().encode(pictures, units, grain)


class WatchedBackend(LocalBackend):
    runner: Watched

    def _runner(self, *given: Any) -> Runner:
        self.runner = Watched(*given)
        self.runner.events = []
        return self.runner


@pytest.fixture
def watched(opened: Opener, folder: Path) -> WatchedBackend:
    backend = opened(folder, kind=WatchedBackend, max_num_batched_tokens=16, max_num_seqs=8)
    assert isinstance(backend, WatchedBackend)
    return backend


def test_running_answers_go_on_between_the_slices_and_no_answer_changes(watched: WatchedBackend, folder: Path) -> None:
    wanted = ask(large(), "What is it?", max_tokens=12)
    others = [ask("Say hello.", max_tokens=4000, ignore_eos=True) for _ in range(2)]

    async def together() -> Result:
        streams = [watched.stream(request) for request in others]
        async with aclosing(streams[0]) as first, aclosing(streams[1]) as second:
            for stream in (first, second):
                await anext(stream)
            return await watched.generate(wanted)

    result = asyncio.run(together())
    events = watched.runner.events
    slices = [place for place, event in enumerate(events) if event == "slice"]
    assert len(slices) > 10
    for here, there in pairwise(slices):
        assert events[here + 1 : there] == [2], "between two slices both running answers get a token"
    reference = Reference(folder)
    assert result.text == reference.tokenizer.decode(reference.generate(wanted), skip_special_tokens=True)
    assert result.usage.image_tokens == 256
    freed(watched)


def test_a_request_that_comes_later_does_not_wait_for_the_picture(watched: WatchedBackend) -> None:
    async def race() -> list[str]:
        ended: list[str] = []

        async def one(name: str, request: Any) -> None:
            await watched.generate(request)
            ended.append(name)

        held = watched.runner.held = threading.Event()
        slow = asyncio.create_task(one("picture", ask(large(1), "x", max_tokens=2, n=2)))
        while "slice" not in watched.runner.events:
            await asyncio.sleep(0.001)
        text = asyncio.create_task(one("text", ask("Say hello.", max_tokens=2)))
        while len(watched._loaded.engine.mailbox) < 2:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        held.set()
        await asyncio.gather(slow, text)
        return ended

    assert asyncio.run(race()) == ["text", "picture"]


def test_features_do_not_depend_on_how_a_picture_is_sliced(watched: WatchedBackend) -> None:
    import torch

    runner, loaded = watched.runner, watched._loaded
    assert loaded is not None
    features = []
    for units in (0.0, 3.0, 17.5, float("inf")):
        runner.features.clear()
        (picture,) = loaded.processor.prepare(ask(large(2), "x")).pictures
        slices, spent = 0, 0.0
        with torch.inference_mode():
            while picture.features is None:
                done = runner.encode([picture], units, grain=10.0)
                assert done <= max(units, 10.0), "no more than there is time for, or one piece"
                slices, spent = slices + 1, spent + done
        features.append(picture.features)
        assert slices == 1 if units == float("inf") else slices >= picture.cost / max(units, 10.0)
        assert spent == pytest.approx(picture.cost), "what a picture costs is the sum of its pieces"
    assert all(torch.equal(one, features[0]) for one in features)
    with torch.inference_mode():
        (whole,) = runner.tower.encode([picture])
    torch.testing.assert_close(features[0], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"max_step_ms": 0.5}, {"goal": "latency"}])
def test_no_answer_depends_on_the_time_that_a_step_may_take(
    opened: Opener, folder: Path, settings: dict[str, Any]
) -> None:
    backend = opened(folder, max_num_seqs=8, **settings)
    asked = [ask(large(7, side), "What is it?", max_tokens=8) for side in (256, 512, 320)]
    asked += [ask("Say hello. " * 40, max_tokens=8)]
    results = run(backend, *asked)
    reference = Reference(folder)
    for request, result in zip(asked, results, strict=True):
        assert result.text == reference.tokenizer.decode(reference.generate(request), skip_special_tokens=True)
    stats = backend.stats()
    parts = [stats[f"step_{part}_seconds_total"] for part in ("decode", "prompt", "picture")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(stats["step_seconds_total"])
    assert stats["step_budget_seconds"] > 0
    assert all(stats[f"cost_{name}_seconds"] > 0 for name in ("decode_step", "prompt_token", "picture_unit"))


def test_one_picture_in_two_requests_is_encoded_once(watched: WatchedBackend) -> None:
    both = run(watched, ask(large(3), "x"), ask(large(3), "What is it?"))
    assert len(both) == 2
    assert watched.stats()["pictures_encoded"] == 1


def test_a_request_that_leaves_takes_its_picture_along(watched: WatchedBackend) -> None:
    async def leave() -> None:
        task = asyncio.create_task(watched.generate(ask(large(4), "x")))
        while "slice" not in watched.runner.events:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    freed(watched)
    assert watched.stats()["pictures_encoded"] == 0
    assert run(watched, ask(large(5), "x", max_tokens=2))[0].usage.completion_tokens == 2
    assert watched.stats()["pictures_encoded"] == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("out of memory"), DeviceMemoryError), (RuntimeError("shape mismatch"), BackendError)],
)
def test_a_slice_that_fails_ends_its_own_request(
    watched: WatchedBackend, error: RuntimeError, expected: type[BackendError]
) -> None:
    watched.runner.fails_after, watched.runner.error = 5, error

    async def both() -> list[Any]:
        requests = (ask(large(6), "x"), ask("Say hello.", max_tokens=30, ignore_eos=True))
        return await asyncio.gather(*(watched.generate(one) for one in requests), return_exceptions=True)

    bad, good = asyncio.run(both())
    assert type(bad) is expected
    assert good.usage.completion_tokens == 30
    freed(watched)
    assert watched.unready() is None
