"""Videos at endpoints: as videos where the probe finds that our frames and times arrive, else as timed pictures."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from qvl import AsyncPipeline
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.wire import Dialect, request_body
from qvl.media.load_video import load_video
from qvl.media.policy import MediaPolicy
from qvl.media.video_sampling import VideoSampling
from qvl.types import ChatRequest, Message, TextPart, VideoPart
from tests.media.films import FORMS, bar, film
from tests.scripted_endpoint import ScriptedEndpoint, ScriptedExchange
from tests.server.conftest import start
from tests.server.echo_backend import EchoBackend


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {ending: film(folder / f"clip.{ending}") for ending in FORMS}


@pytest.mark.asyncio
async def test_qvl_serve_takes_the_file_and_shows_the_frames_that_were_chosen_here(films: dict[str, Path]) -> None:
    server = start(EchoBackend())
    backend = OpenAIBackend("echo-vl", base_url=server.url)
    async with AsyncPipeline(backend=backend, cache="off") as pipeline:
        await backend.open()
        assert backend.capabilities.videos > 1
        server.backend.requests.clear()
        sampling = {"nframes": 3, "video_start": 0.5, "video_end": 1.5}
        results = [await pipeline.ask(path, "When?", video=sampling) for path in films.values()]
        both = await pipeline.ask([films["mp4"], films["ts"]], "When?", video={"timestamps": [0.2, 1.9]})
    server.stop()
    for result, request in zip(results, server.backend.requests, strict=False):
        # What the server says of its own backend, which takes pictures alone.
        assert len(result.notes) == 1
        assert "sent as 3 pictures, each behind its time, since echo:echo-vl takes no videos" in result.notes[0]
        assert result.usage.video_frames == 3
        assert result.videos[0].times == (0.5, 1.0, 1.5)
        texts = [part.text for part in request.messages[-1].parts if isinstance(part, TextPart)]
        assert texts == ["<0.5 seconds>", "<1.0 seconds>", "<1.5 seconds>", "When?"]
        assert [round(bar(frame.rgb()) / 6.4) for frame in request.pictures] == [6, 11, 16]
    assert len(server.backend.requests) == len(films) + 1
    assert both.usage.video_frames == len(server.backend.requests[-1].pictures) == 4


@pytest.mark.slow
@pytest.mark.asyncio
async def test_every_container_gives_one_answer_locally_and_by_qvl_serve(films: dict[str, Path]) -> None:
    def local() -> LocalBackend:
        return LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20)

    async def answers(backend: LocalBackend | OpenAIBackend) -> list[tuple[object, ...]]:
        told = []
        async with AsyncPipeline(backend=backend, cache="off") as pipeline:
            for path in films.values():
                result = await pipeline.ask(path, "When?", max_tokens=4, video={"nframes": 4})
                assert result.notes == ()
                usage = result.usage
                told.append((result.videos[0].times, usage.video_frames, usage.video_tokens, usage.prompt_tokens))
        return told

    ours = await answers(local())
    server = start(local(), cache="off")
    try:
        its = await answers(OpenAIBackend(base_url=server.url, connect_timeout=60))
    finally:
        server.stop()
    assert len(films) >= 5
    assert ours[0][:2] == ((0.0, 0.6, 1.3, 1.9), 4)
    assert set(ours) == set(its) == {ours[0]}


@pytest.mark.asyncio
async def test_an_endpoint_that_takes_no_videos_is_sent_timed_pictures_with_a_note(films: dict[str, Path]) -> None:
    with ScriptedEndpoint() as endpoint:
        backend = OpenAIBackend("echo", base_url=endpoint.url)
        async with AsyncPipeline(backend=backend, cache="off") as pipeline:
            result = await pipeline.ask(films["mp4"], "When?", video={"nframes": 2})
        content = endpoint.chats[-1].body["messages"][0]["content"]
    assert backend.capabilities.videos == 0
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in content if part["type"] == "text"] == ["<0.0 seconds>", "<1.9 seconds>", "When?"]
    assert "clip.mp4: sent as 2 pictures, each behind its time, since openai:echo takes no videos" in result.notes[0]


class Forbidding(ScriptedEndpoint):
    """An endpoint behind a gateway that lets no video through; `status` is what it says of one."""

    status = 403

    async def _respond(self, exchange: ScriptedExchange) -> None:
        if "video_url" in str(exchange.received.body):
            await exchange.whole(self.status, {"error": {"message": "not this"}})
        else:
            await super()._respond(exchange)


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [401, 403, 404, 413, 429, 500, 502, 503, 504])
async def test_whatever_is_said_of_a_video_words_and_pictures_work_without(status: int, films: dict[str, Path]) -> None:
    with Forbidding() as endpoint:
        endpoint.status = status
        backend = OpenAIBackend("echo", base_url=endpoint.url)
        async with AsyncPipeline(backend=backend, cache="off") as pipeline:
            assert (await pipeline.ask(films["mp4"], "When?", video={"nframes": 2})).text
    assert backend.capabilities.images
    assert backend.capabilities.videos == 0


class Watching(ScriptedEndpoint):
    """An endpoint of vLLM's kind: every two frames, one behind another, are told with their time in the prompt."""

    async def _respond(self, exchange: ScriptedExchange) -> None:
        body = exchange.received.body
        if exchange.received.path.endswith("/chat/completions"):
            messages = copy.deepcopy(body["messages"])
            for part in messages[-1]["content"] if isinstance(messages[-1]["content"], list) else ():
                if part["type"] == "video_url" and part["video_url"]["url"].startswith("data:video/jpeg;base64,"):
                    told = body["media_io_kwargs"]["video"]
                    words = [" ".join(f"{at / told['fps']:.1f}") for at in told["frames_indices"]]
                    part |= {"type": "text", "text": " ".join(words)}
            exchange.received = dataclasses.replace(exchange.received, body={**body, "messages": messages})
        await super()._respond(exchange)


@pytest.mark.asyncio
async def test_an_endpoint_that_is_told_times_takes_one_video_to_a_request(films: dict[str, Path]) -> None:
    with Watching() as endpoint:
        backend = OpenAIBackend("echo", base_url=endpoint.url)
        async with AsyncPipeline(backend=backend, cache="off") as pipeline:
            one = await pipeline.ask(films["mp4"], "When?", video={"nframes": 2})
            body = endpoint.chats[-1].body
            two = await pipeline.ask([films["mp4"], films["ts"]], "When?", video={"nframes": 1})
            more = endpoint.chats[-1].body
    assert backend.capabilities.videos == 1
    assert one.notes == ()
    assert one.usage.video_frames == 2
    assert [part["type"] for part in body["messages"][0]["content"]] == ["video_url", "text"]
    assert body["media_io_kwargs"]["video"]["frames_indices"] == [0, 1900]
    assert [part["type"] for part in more["messages"][0]["content"]] == ["text", "image_url"] * 2 + ["text"]
    assert "media_io_kwargs" not in more
    assert "since openai:echo takes at most 1 video" in two.notes[0]
    assert len(two.notes) == 2


def test_frames_are_written_with_their_times_as_vllm_takes_them(films: dict[str, Path]) -> None:
    video = load_video(films["mkv"], sampling=VideoSampling(timestamps=(0.2, 0.5, 1.9)))
    request = ChatRequest((Message("user", (TextPart("a"), VideoPart(video))),))
    body = json.loads(b"".join(request_body(request, "m", Dialect(videos="frames"))))
    (said, shown) = body["messages"][0]["content"]
    assert said == {"type": "text", "text": "a"}
    head, _, rest = shown["video_url"]["url"].partition(",")
    assert head == "data:video/jpeg;base64"
    frames = [Image.open(io.BytesIO(base64.b64decode(text))) for text in rest.split(",")]
    assert [frame.tobytes() for frame in frames] == [frame.rgb().tobytes() for frame in video.frames]
    told = body["media_io_kwargs"]["video"]
    assert [at / told["fps"] for at in told["frames_indices"]] == [0.2, 0.5, 1.9]
    assert told["total_num_frames"] > told["frames_indices"][-1]


def test_frames_that_were_made_smaller_are_smaller_at_the_endpoint_too(films: dict[str, Path]) -> None:
    part = VideoPart(load_video(films["mp4"], MediaPolicy(max_video_pixels=2 * 96 * 72), VideoSampling(nframes=2)))
    for request, size in (
        (ChatRequest((Message("user", (part,)),)), {"resized_width": 96, "resized_height": 72}),
        (ChatRequest((Message("user", (part,)),), max_pixels=5000), {"resized_width": 81, "resized_height": 61}),
        (ChatRequest((Message("user", (part,)),), max_pixels=1024), {"max_pixels": 36 * 27}),
        (ChatRequest((Message("user", (VideoPart(load_video(films["mp4"])),)),)), {}),
    ):
        body = json.loads(b"".join(request_body(request, "m", Dialect(videos="file"))))
        (shown,) = body["messages"][0]["content"]
        named = ("max_pixels", "min_pixels", "resized_width", "resized_height")
        assert {name: shown[name] for name in named if name in shown} == size
        assert base64.b64decode(shown["video_url"]["url"].partition(",")[2]) == films["mp4"].read_bytes()
