"""The form in which a video goes to an endpoint: kept apart in the cache, within the endpoint's limits, as chosen."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl import AsyncPipeline
from qvl.backends.base import Capabilities
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.failures import from_status
from qvl.backends.openai.probe import common
from qvl.backends.openai.wire import Dialect, request_body
from qvl.errors import RequestError, UnsupportedInputError
from qvl.media.load_video import load_video
from qvl.media.policy import MediaPolicy
from qvl.types import ChatRequest, ImagePart, Message, TextPart, VideoPart
from tests.backends.openai.test_videos import Watching
from tests.media.films import film
from tests.scripted_endpoint import ScriptedEndpoint
from tests.server.conftest import Running, start
from tests.server.echo_backend import EchoBackend


class Filming(EchoBackend):
    """A model that takes videos."""

    @property
    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities, videos=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "clip.mp4", size=(320, 240))


@pytest.fixture
def server() -> Iterator[Running]:
    running = start(Filming("echo"), cache="off")
    yield running
    running.stop()


@pytest.mark.asyncio
async def test_answers_to_each_form_of_a_video_are_kept_apart(clip: Path, server: Running) -> None:
    keys, forms = set[str | None](), []
    with Watching() as frames, ScriptedEndpoint() as pictures:
        for url in (frames.url, pictures.url, server.url):
            backend = OpenAIBackend("echo", base_url=url, identity="one deployment")
            async with AsyncPipeline(backend=backend, cache="memory:") as pipeline:
                first = await pipeline.ask(clip, "When?", video={"nframes": 2})
                again = await pipeline.ask(clip, "When?", video={"nframes": 2})
                words = await pipeline.ask([], "When?")
            assert (first.cache, again.cache) == ("miss", "hit")
            keys |= {first.key}
            forms.append((backend.capabilities.video_form, words.key))
    assert [form for form, _ in forms] == ["frames", "", "file"]
    assert len(keys) == 3
    assert len({key for _, key in forms}) == 1


def test_endpoints_that_take_videos_otherwise_are_all_sent_pictures() -> None:
    from qvl.backends.openai.probe import ASSUMED

    def of(form: str, videos: int, body: int | None = None) -> Capabilities:
        return dataclasses.replace(ASSUMED.capabilities, videos=videos, video_form=form, body_bytes=body)

    def together(*several: Capabilities) -> Capabilities:
        return common([dataclasses.replace(ASSUMED, capabilities=one) for one in several])

    assert together(of("file", 4), of("frames", 1)).videos == 0
    assert together(of("file", 4), of("", 0)).videos == 0
    same = together(of("file", 4, 2_000), of("file", 2, 1_000))
    assert (same.videos, same.video_form, same.body_bytes) == (2, "file", 1_000)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "size",
    [
        {"min_pixels": 400_000},
        {"resized_height": 480, "resized_width": 256},
        {"max_pixels": 20_000},
        {"max_pixels": 1024},
        {},
    ],
)
async def test_an_endpoint_sees_frames_in_the_size_that_was_asked_for(
    clip: Path, server: Running, size: dict[str, int]
) -> None:
    async with AsyncPipeline(backend=OpenAIBackend(base_url=server.url), cache="off") as pipeline:
        part = {"type": "video", "video": str(clip), "nframes": 3, **size}
        result = await pipeline.chat([{"role": "user", "content": [part, {"type": "text", "text": "When?"}]}])
    (seen,) = server.backend.requests[-1].videos
    (chosen,) = result.videos  # type: ignore[union-attr]
    assert (seen.width, seen.height) == (chosen.width, chosen.height)
    assert seen.times == chosen.times
    assert not size or (seen.width, seen.height) != (320, 240)


@pytest.mark.asyncio
async def test_what_is_sent_as_a_file_is_not_decoded_here(clip: Path, server: Running) -> None:
    async with AsyncPipeline(backend=OpenAIBackend(base_url=server.url), cache="memory:") as pipeline:
        result = await pipeline.ask(clip, "When?", video={"nframes": 3})
    assert len(server.backend.requests[-1].videos) == 1
    assert not any(frame.at_hand for frame in result.pictures)
    assert result.pictures[2].rgb().size == (320, 240)


def padded(path: Path, source: Path, size: int) -> Path:
    """Write the film with so many bytes behind it that a player passes over."""
    path.write_bytes(source.read_bytes() + struct.pack(">I4s", size + 8, b"free") + bytes(size))
    return path


@pytest.mark.asyncio
async def test_a_film_that_is_too_large_for_an_endpoint_is_sent_as_pictures_with_a_note(
    clip: Path, tmp_path: Path
) -> None:
    server = start(Filming(), cache="off", max_body_bytes=2 << 20)
    large = padded(tmp_path / "large.mp4", clip, 3 << 19)
    backend = OpenAIBackend(base_url=server.url)
    async with AsyncPipeline(backend=backend, cache="off") as pipeline:
        small = await pipeline.ask(padded(tmp_path / "small.mp4", clip, 1 << 20), "When?", video={"nframes": 2})
        result = await pipeline.ask(large, "When?", video={"nframes": 2})
    server.stop()
    assert small.notes == ()
    parts = server.backend.requests[-1].messages[-1].parts
    assert [type(part) for part in parts] == [TextPart, ImagePart, TextPart, ImagePart, TextPart]
    assert result.usage.video_frames == 2
    (note,) = result.notes
    assert "large.mp4: sent as 2 pictures, each behind its time" in note
    assert "takes at most 2 MiB in a request" in note


@pytest.mark.asyncio
async def test_frames_that_are_too_large_as_pictures_too_are_refused_with_the_way_out(clip: Path) -> None:
    server = start(Filming(), cache="off", max_body_bytes=70_000)
    try:
        async with AsyncPipeline(backend=OpenAIBackend(base_url=server.url), cache="off") as pipeline:
            fits = await pipeline.ask(clip, "When?", video={"nframes": 1})
            asked = len(server.backend.requests)
            with pytest.raises(RequestError, match=r"with its 20 pictures has 0\.") as caught:
                await pipeline.ask(clip, "When?", video={"nframes": 20})
            assert len(server.backend.requests) == asked
    finally:
        server.stop()
    assert "sent as 1 picture, each" in fits.notes[0]
    assert "takes at most 0.07 MiB in a request" in caught.value.message
    assert "fewer frames: nframes" in str(caught.value)
    assert caught.value.code == "request_too_large"


def test_a_proxy_that_takes_no_large_body_is_told_with_the_way_out() -> None:
    failed = from_status(413, "<html><h1>413 Request Entity Too Large</h1></html>", {}, "http://proxy/v1")
    assert isinstance(failed.error, RequestError)
    assert "fewer frames: nframes" in str(failed.error)
    assert failed.error.code == "request_too_large"


@pytest.mark.asyncio
async def test_a_server_tells_how_many_videos_it_takes(clip: Path) -> None:
    server = start(Filming(), cache="off", media=MediaPolicy(allow_files=False, max_videos=1))
    entry = server.get("/v1/models").json()["data"][0]
    assert (entry["max_videos"], entry["max_body_bytes"]) == (1, server.core.settings.max_body_bytes)
    backend = OpenAIBackend(base_url=server.url)
    async with AsyncPipeline(backend=backend, cache="off") as pipeline:
        result = await pipeline.ask([clip, clip], "Which?", video={"nframes": 1})
    server.stop()
    assert backend.capabilities.videos == 1
    assert len(result.notes) == 2
    assert "takes at most 1 video" in result.notes[0]
    assert not server.backend.requests[-1].videos


@pytest.mark.asyncio
async def test_frames_are_chosen_by_media_io_kwargs_and_never_by_the_endpoint(clip: Path, server: Running) -> None:
    async with AsyncPipeline(backend=OpenAIBackend(base_url=server.url), cache="off") as pipeline:
        content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "When?"}]
        messages = [{"role": "user", "content": content}]
        for chosen, count in (({"num_frames": 5}, 5), ({"fps": 4}, 8)):
            result = await pipeline.chat(messages, extra={"media_io_kwargs": {"video": chosen}})
            assert result.usage.video_frames == count  # type: ignore[union-attr]
            assert len(server.backend.requests[-1].pictures) == count
        with pytest.raises(UnsupportedInputError, match=r"media_io_kwargs.video.frames_indices is not supported"):
            await pipeline.chat(messages, extra={"media_io_kwargs": {"video": {"frames_indices": [1]}}})


def test_fields_of_a_request_do_not_replace_the_frames_and_times_of_its_video(clip: Path) -> None:
    message = Message("user", (VideoPart(load_video(clip)),))
    wire = Dialect(videos="frames")
    kept = ChatRequest((message,), extra={"media_io_kwargs": {"image": {"rgba_background_color": 0}}})
    sent = json.loads(b"".join(request_body(kept, "m", wire)))["media_io_kwargs"]
    assert set(sent) == {"image", "video"}
    for form in ("frames", "file"):
        other = kept.replace(extra={"media_io_kwargs": {"video": {"num_frames": 2}}})
        with pytest.raises(UnsupportedInputError, match=r"media_io_kwargs.video cannot be set beside a video"):
            request_body(other, "m", dataclasses.replace(wire, videos=form))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_tokens_of_a_video_are_counted_as_it_is_sent(clip: Path) -> None:
    server = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache="off")
    try:
        request = ChatRequest((Message("user", (VideoPart(load_video(clip)), TextPart("When?"))),))
        async with OpenAIBackend(base_url=server.url, connect_timeout=60) as backend:
            counted = await backend.tokenize(request)
            answered = await backend.generate(request)
    finally:
        server.stop()
    assert answered.usage.video_tokens > 0
    assert len(counted.ids) == answered.usage.prompt_tokens
