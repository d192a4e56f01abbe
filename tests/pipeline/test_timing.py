"""Where the time went: every stage counts once, and the whole is no less than its parts."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from qvl import Pipeline
from qvl.cli import tables as show
from qvl.cli.records import PictureRecord
from qvl.html.report import HtmlReport

from .conftest import TalkingBackend


class Slow(TalkingBackend):
    """Takes its time to load."""

    async def open(self) -> None:
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("cache", ["off", "memory:"])
def test_loading_the_model_is_a_stage_of_its_own(picture: Image.Image, tmp_path: Path, cache: str) -> None:
    path = tmp_path / "mug.png"
    picture.save(path)
    with Pipeline(backend=TalkingBackend(), cache=cache) as warm:
        warm.ask(path, "q")
    pipe = Pipeline(backend=Slow(), cache=cache)
    try:
        first, again = pipe.ask(path, "q"), pipe.ask(path, "another")
        streamed = list(pipe.stream(path, "a third"))
    finally:
        pipe.close()
    times = first.timing
    assert times.loading >= 0.2
    assert 0 < times.decoding <= times.media
    assert times.media + times.cache + times.loading + times.first_token <= times.total
    assert again.timing.loading < times.loading
    assert streamed
    assert not again.timing.loading
    labels = [label for label, _ in show.timed(PictureRecord(0, 1, "mug.png", "r", result=first))]
    assert labels[0] == "media"
    assert "model load" in labels


@pytest.mark.parametrize("cache", ["off", "memory:"])
def test_loading_is_told_once_and_charged_to_nobody_who_only_waited(
    picture: Image.Image, tmp_path: Path, cache: str
) -> None:
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.png")
        picture.rotate(90 * number).save(paths[-1])
    # One twice, so that one of them joins the work of the other.
    pipe = Pipeline(backend=Slow(), concurrency=5, cache=cache)
    began = time.perf_counter()
    try:
        results = list(pipe.map([*paths, paths[0]], "q"))
        whole = time.perf_counter() - began
    finally:
        pipe.close()
    loaded = [item.result.timing for item in results if item.result.timing.loading]
    assert len(results) == 5
    assert len(loaded) == 1
    others = [item.result.timing for item in results if not item.result.timing.loading]
    # On a busy machine their own work may take longer than the loading; that they were charged for would be more than
    # the time there was beside it.
    assert all(timing.total <= whole - loaded[0].loading for timing in others)
    records = [PictureRecord(0, n, "x", "r", result=item.result) for n, item in enumerate(results)]
    assert f"model load {loaded[0].loading:.2f} s" in show.counted(records)
    report = HtmlReport("qvl analyze")
    for record in records:
        report.add(record)
    page = report.html()
    assert f"model load {loaded[0].loading:.2f} s" in page
    told = sorted(float(seconds) for seconds in re.findall(r'data-seconds="([^"]+)"', page))
    spent = sorted(item.result.timing.total - item.result.timing.loading for item in results)
    assert told == pytest.approx(spent, abs=1e-6)
    assert f"{spent[-1]:.2f} s</b><span>longest" in page
