"""Moments in schemas are seconds, however a model writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from qvl import Moment, Pipeline
from tests.media.films import film
from tests.pipeline.conftest import TalkingBackend


class Door(BaseModel):
    opens: Moment
    closes: Moment | None = None


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("12.5", 12.5), ("0", 0.0), ('"1:02.5"', 62.5), ('"0:01:02"', 62.0), ('"3 s"', 3.0), ('"<1.5 seconds>"', 1.5)],
)
def test_a_moment_is_read_in_every_form(tmp_path: Path, told: str, seconds: float) -> None:
    backend = TalkingBackend(reply=lambda _: f'{{"opens": {told}, "closes": null}}')
    with Pipeline(backend=backend, cache=None) as pipeline:
        analysis = pipeline.analyze(film(tmp_path / "clip.mp4", frames=6), schema=Door)
    assert analysis.opens == seconds
    (request,) = backend.requests
    assert "seconds from its start" in request.messages[-1].text
    assert "<0.2 seconds>" in request.messages[-1].text


@pytest.mark.parametrize("told", [-1, "soon", "1:2:3:4", float("nan")])
def test_what_is_no_time_is_refused(told: object) -> None:
    with pytest.raises(ValidationError):
        Door(opens=told)  # type: ignore[arg-type]


def test_the_schema_of_a_moment_is_a_number() -> None:
    field = Door.model_json_schema()["properties"]["opens"]
    assert (field["type"], field["minimum"]) == ("number", 0)
