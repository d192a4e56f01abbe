"""Videos in the verbs: paths and parts, frames in key, Result and usage, timed pictures for who takes no videos."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl import Pipeline, Result
from qvl.backends.base import Capabilities
from qvl.errors import ConfigError, RequestError, UnsupportedInputError
from qvl.types import ImagePart, TextPart
from tests.media.films import film
from tests.pipeline.conftest import TalkingBackend


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "clip.mp4")


@pytest.fixture
def backend() -> TalkingBackend:
    return TalkingBackend()


def test_a_path_is_shown_as_pictures_behind_their_times(backend: TalkingBackend, clip: Path) -> None:
    with Pipeline(backend=backend, cache="memory:") as pipeline:
        result = pipeline.ask(clip, "When?")
        assert pipeline.ask(str(clip), "When?").cache == "hit"
    (request,) = backend.requests
    parts = request.messages[-1].parts
    times = [part.text for part in parts if isinstance(part, TextPart)]
    assert times == ["<0.0 seconds>", "<0.6 seconds>", "<1.3 seconds>", "<1.9 seconds>", "When?"]
    assert [isinstance(part, ImagePart) for part in parts] == [False, True] * 4 + [False]
    assert result.usage.video_frames == 4
    assert result.videos[0].times == (0.0, 0.6, 1.3, 1.9)
    assert len(result.pictures) == 4
    assert "sent as 4 pictures, each behind its time" in result.notes[0]


@pytest.mark.parametrize(
    ("part", "more", "times"),
    [
        ({"type": "video", "nframes": 2}, {}, (0.0, 1.9)),
        ({"type": "video", "fps": 1, "min_frames": 1}, {}, (0.0, 1.9)),
        ({"type": "video", "video_start": 1.0, "video_end": 1.2, "fps": 10}, {}, (1.0, 1.1, 1.2)),
        ({"type": "video"}, {"extra": {"mm_processor_kwargs": {"num_frames": 3}}}, (0.0, 1.0, 1.9)),
        ({"type": "video"}, {"extra": {"mm_processor_kwargs": {"fps": 4}}}, None),
        ({"type": "video"}, {"video": {"timestamps": [0.5]}}, (0.5,)),
        ({"type": "video", "nframes": 2}, {"video": {"nframes": 5}}, (0.0, 1.9)),
    ],
)
def test_frames_are_chosen_by_part_and_request(
    backend: TalkingBackend, clip: Path, part: Any, more: Any, times: tuple[float, ...] | None
) -> None:
    with Pipeline(backend=backend, cache=None) as pipeline:
        content = [{**part, "video": str(clip)}, {"type": "text", "text": "q"}]
        result = pipeline.chat([{"role": "user", "content": content}], **more)
    assert isinstance(result, Result)
    if times is None:
        assert len(result.videos[0].times) == 8
    else:
        assert result.videos[0].times == times
    assert backend.requests[0].extra == {}


@pytest.mark.parametrize("verb", ["ask", "analyze", "decide"])
def test_adapter_and_template_of_a_request_reach_the_backend(verb: str) -> None:
    class Adapted(TalkingBackend):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, fields=frozenset({"chat_template_kwargs"}))

        def adapters(self) -> dict[str, str]:
            return {"shelf": "digest"}

    backend = Adapted(reply=lambda request: '{"brand": "NORVIK", "category": "mug", "attributes": {}}')
    told: Any = {"adapter": "shelf", "chat_template_kwargs": {"enable_thinking": False}}
    picture = Image.new("RGB", (64, 64))
    with Pipeline(backend=backend, cache=None) as pipeline:
        if verb == "decide":
            pipeline.decide(picture, "Is it blue?", **told)
        else:
            getattr(pipeline, verb)(picture, *(["What?"] if verb == "ask" else []), **told)
        if verb == "analyze":
            pipeline.analyze(picture, adapter="shelf", extra={"chat_template_kwargs": {"enable_thinking": False}})
    for request in backend.requests:
        assert request.adapter == "shelf"
        assert dict(request.chat_template_kwargs) == {"enable_thinking": False}


def test_every_form_of_a_part_is_one_answer(backend: TalkingBackend, clip: Path) -> None:
    data = base64.b64encode(clip.read_bytes()).decode()
    url = f"data:video/mp4;base64,{data}"
    with Pipeline(backend=backend, cache="memory:") as pipeline:
        keys = set()
        for part in (
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "video_url", "video_url": url},
            {"type": "video", "video": clip.as_uri()},
            {"type": "video", "base64": data, "mime_type": "video/mp4"},
            {"type": "image_url", "image_url": {"url": url}},
            {"video": str(clip)},
        ):
            keys.add(pipeline.chat([{"role": "user", "content": [part, {"type": "text", "text": "q"}]}]).key)
        assert len(keys) == 1
        other = {"type": "video", "video": str(clip), "nframes": 3}
        keys.add(pipeline.chat([{"role": "user", "content": [other, {"type": "text", "text": "q"}]}]).key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"nframes": 200}, "20 frames are shown instead of 200, all that there are"),
        ({"nframes": 9, "video_start": 0.5, "video_end": 0.7}, "3 frames are shown instead of 9, all that there are"),
        ({"fps": 30}, "20 frames are shown instead of the 60 of fps=30, all that there are"),
        ({"nframes": 20}, None),
        ({"fps": 30, "max_frames": 5}, None),
        ({}, None),
    ],
)
def test_frames_that_a_film_does_not_have_are_told(clip: Path, asked: dict[str, Any], words: str | None) -> None:
    with Pipeline(backend=Roomy(), cache="memory:") as pipeline:
        told = [note for note in pipeline.ask(clip, "q", video=asked).notes if "instead of" in note]
        assert told == ([] if words is None else [f"{clip}: {words}"])
        if "nframes" in asked and asked["nframes"] > 20:
            other = pipeline.ask(clip, "q", video={"nframes": 20})
            assert other.cache == "hit"
            assert not [note for note in other.notes if "instead of" in note]


def test_a_note_names_the_film_of_its_own_request_and_not_of_the_one_that_was_kept(
    backend: TalkingBackend, clip: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    told = "sent as 4 pictures, each behind its time, since talking:parrot takes no videos"
    with Pipeline(backend=backend, cache="memory:") as pipeline:
        for shown, state, name in (
            (clip, "miss", str(clip)),
            (other, "hit", str(other)),
            (clip.read_bytes(), "hit", "video 1"),
        ):
            result = pipeline.ask(shown, "When?")
            assert result.cache == state
            assert result.notes == (f"{name}: {told}",)


class Roomy(TalkingBackend):
    """One that takes more pictures."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, images=64)


def test_what_cannot_be_is_refused_by_name(backend: TalkingBackend, clip: Path) -> None:
    with Pipeline(backend=backend, cache=None) as pipeline:
        with pytest.raises(UnsupportedInputError, match="is a video, and places are told on pictures alone"):
            pipeline.locate(clip, "door")
        with pytest.raises(RequestError, match=r"messages\[0\].content\[0\].fps is 'x', not a number"):
            pipeline.chat([{"role": "user", "content": [{"type": "video", "video": str(clip), "fps": "x"}]}])
        with pytest.raises(UnsupportedInputError, match="a list of frames is not a video"):
            pipeline.chat([{"role": "user", "content": [{"type": "video", "video": ["a.png"]}]}])
        with pytest.raises(ConfigError, match="unknown key 'fsp' in video"):
            pipeline.ask(clip, "q", video={"fsp": 1})


def test_a_card_shows_a_strip_of_frames_with_their_times(backend: TalkingBackend, clip: Path) -> None:
    with Pipeline(backend=backend, cache=None) as pipeline:
        result = pipeline.ask(clip, "q", video={"nframes": 3})
    page = result._repr_html_()
    assert page.count("<img ") == page.count("<figcaption") == 3
    for words in ("0.0 s</figcaption>", "1.0 s</figcaption>", "1.9 s</figcaption>", "clip.mp4: 3 frames of 2.0 s"):
        assert words in page
