"""A keyword that a verb does not have is refused in one line before anything is read or asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import qvl
from qvl import AsyncPipeline, ConfigError, Pipeline
from tests.pipeline.conftest import TalkingBackend

# A file that does not exist: who reads it before the names are checked says so instead.
LOST = "lost.png"


@pytest.fixture(scope="module")
def backend() -> TalkingBackend:
    return TalkingBackend()


@pytest.fixture(scope="module")
def pipe(backend: TalkingBackend) -> Any:
    with Pipeline(backend=backend, cache="off") as pipeline:
        yield pipeline


VERBS: dict[str, Callable[..., Any]] = {
    "ask": lambda pipe, **params: pipe.ask(LOST, "What is it?", **params),
    "stream": lambda pipe, **params: list(pipe.stream(LOST, "What is it?", **params)),
    "chat": lambda pipe, **params: pipe.chat([{"role": "user", "content": "Hi"}], **params),
    "stream_chat": lambda pipe, **params: list(pipe.stream_chat([{"role": "user", "content": "Hi"}], **params)),
    "analyze": lambda pipe, **params: pipe.analyze(LOST, **params),
    "analyze_result": lambda pipe, **params: pipe.analyze_result(LOST, **params),
    "decide": lambda pipe, **params: pipe.decide(LOST, ["Is it red?"], **params),
    "locate": lambda pipe, **params: pipe.locate(LOST, "the brand", **params),
    "read": lambda pipe, **params: list(pipe.read(LOST, **params)),
    # Not read to its end, not even begun.
    "map": lambda pipe, **params: pipe.map([LOST], **params),
    "map of a question": lambda pipe, **params: pipe.map([LOST], "What is it?", **params),
    "map of places": lambda pipe, **params: pipe.map([LOST], locate="the brand", **params),
    "map elsewhere": lambda pipe, **params: pipe.map([LOST], engine="ray", **params),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("name", "meant"), [("max_pixel", "max_pixels"), ("cach", "cache")])
def test_a_misspelt_keyword_is_refused_with_the_one_that_was_meant(
    pipe: Pipeline, backend: TalkingBackend, verb: str, name: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*did you mean '{meant}'") as caught:
        VERBS[verb](pipe, **{name: 1})
    assert caught.value.param == name
    assert backend.requests == []


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"shema": dict}, "'shema'.*did you mean 'schema'"),
        ({"concurency": 2}, "did you mean 'concurrency'"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"temperature": -1}, "temperature"),
        ({"schema": 5}, "schema"),
        ({"evidence": "yes"}, "evidence='yes' is neither"),
        ({"system": "Be short."}, "system needs a question"),
        ({"tools": []}, "no parameter 'tools'"),
        ({"question": "What?", "evidence": True}, "evidence is of analyses, not of a question"),
        ({"locate": "it", "abstain": 0.5}, "abstain is of analyses, not of locate"),
        ({"locate": "it", "temperature": 1}, "locate.. has no parameter 'temperature'"),
        ({"question": " "}, "the question is empty"),
        ({"replicas": 2}, "are for engine='ray'"),
    ],
)
def test_what_is_wrong_with_every_picture_of_a_map_is_said_once_and_at_once(
    pipe: Pipeline, backend: TalkingBackend, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipe.map([LOST] * 3, **params)
    other = AsyncPipeline(backend=backend, cache="off")
    with pytest.raises(ConfigError, match=words):
        other.map([LOST] * 3, **params)


def test_a_frame_is_refused_like_a_map(pipe: Pipeline) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [LOST]})
    with pytest.raises(ConfigError, match="did you mean 'progress'"):
        qvl.analyze_frame(frame, "image", pipeline=pipe, progres=True)
    with pytest.raises(ConfigError, match="did you mean 'language'"):
        qvl.analyze_frame(frame, "image", langage="en")  # without a pipeline too
