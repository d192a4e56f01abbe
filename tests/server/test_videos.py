"""Videos over HTTP: `video_url` as vLLM's clients send it, with the frames in the usage."""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.media.policy import MediaPolicy
from tests.media.films import film, sound_alone
from tests.server.conftest import Running, start
from tests.server.echo_backend import EchoBackend
from tests.server.test_chat import events

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = film(tmp_path_factory.mktemp("films") / "clip.webm", size=(320, 240)).read_bytes()
    assert len(data) > 13 * 1024, "long enough to be taken out of the body"
    return f"data:video/webm;base64,{base64.b64encode(data).decode()}"


def asked(url: str, part: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": url}, **(part or {})},
        {"type": "text", "text": "When does the door open?"},
    ]
    return {"model": "echo-vl", "messages": [{"role": "user", "content": content}], **fields}


def test_frames_are_chosen_by_the_request_and_told_in_the_usage(serve: Any, url: str) -> None:
    server: Running = serve(EchoBackend())
    answer = server.post(CHAT, asked(url, mm_processor_kwargs={"fps": 3}))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["video_frames"] == 6
    text = "".join(part.text for part in server.backend.requests[-1].messages[-1].parts if hasattr(part, "text"))
    assert text.startswith("<0.0 seconds><0.4 seconds>")
    of_part = server.post(CHAT, asked(url, {"nframes": 2}, mm_processor_kwargs={"fps": 3}))
    assert of_part.json()["usage"]["prompt_tokens_details"]["video_frames"] == 2


def test_every_api_says_that_frames_were_shown_as_pictures(serve: Any, url: str) -> None:
    server: Running = serve(EchoBackend())
    body = asked(url, {"nframes": 2})
    whole = server.post(CHAT, body).json()["notes"]
    assert len(whole) == 1
    # The data: URL that a client sends is no name.
    assert whole[0] == "video 1: sent as 2 pictures, each behind its time, since echo:echo-vl takes no videos"
    assert server.post(CHAT, body).json()["notes"] == whole, "from the cache too"
    streamed = events(server.post(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert [event["notes"] for event in streamed if event.get("usage")] == [whole]
    *_, told = events(server.post(CHAT, {**body, "stream": True}).text)
    assert told["notes"] == whole
    assert told["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "When?"}]
    for fields in ({}, {"stream": True}):
        answer = server.post("/v1/responses", {"input": [{"role": "user", "content": content}], **fields})
        assert answer.text.count("sent as 4 pictures") == 1, answer.text
    parts = [{"type": "image", "source": {"type": "url", "url": url}}, {"type": "text", "text": "When?"}]
    for fields in ({}, {"stream": True}):
        asking = {"model": "echo-vl", "max_tokens": 9, "messages": [{"role": "user", "content": parts}], **fields}
        answer = server.post("/v1/messages", asking)
        assert answer.text.count("sent as 4 pictures") == 1, answer.text
    pictures = [{"type": "text", "text": "one two"}]
    assert "notes" not in server.post(CHAT, {"messages": [{"role": "user", "content": pictures}]}).json()


def test_what_cannot_be_is_refused_with_its_place(serve: Any, url: str, tmp_path: Path) -> None:
    server: Running = serve(EchoBackend())
    song = base64.b64encode(sound_alone(tmp_path / "song.mp4").read_bytes()).decode()
    for body, words in (
        (asked(f"data:video/mp4;base64,{song}"), "has sound alone, no pictures"),
        (asked(url[:2000]), "broken"),
        (asked("/etc/passwd.mp4"), "paths are not accepted"),
        (asked(url, {"nframes": 0}), "nframes"),
        (asked(url, mm_processor_kwargs={"fps": "x"}), "mm_processor_kwargs.fps"),
        (asked(url, {"nframes": 9}), "9 pictures"),
    ):
        answer = server.post(CHAT, body)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert words in message, message
    assert server.post(CHAT, asked(url[:2000])).json()["error"]["param"] == "messages[0].content[0].video_url"


SOURCES = [
    None,
    True,
    3,
    [],
    ["a.png"],
    {},
    {"url": None},
    {"url": 3},
    {"url": {}},
    {"frob": 1},
    "",
    " ",
    "http://",
    "x.mp4",
]
SOURCES += ["file:///etc/passwd", "ftp://a/b.mp4", "http://[::1", "http://10.0.0.1/a.mp4", "data:", "data:video/mp4"]
SOURCES += [f"data:video/mp4;base64,{text}" for text in ("", "!!", "AAAA", "é", "A" * 1001)]
SOURCES += ["data:video/mp4,x", "data:video/jpeg;base64,AAAA,BBBB", "data:text/plain;base64,AAAA"]
FIELDS = ("fps", "nframes", "timestamps", "video_start", "video_end", "min_frames", "max_frames")
ODD = (True, -1, 1e300, 10**30, "x", [], {}, [None], [-1.0], [0.0] * 900)


@pytest.fixture(scope="module")
def watching() -> Iterator[Running]:
    running = start(EchoBackend())
    yield running
    running.stop()


def refused(server: Running, body: dict[str, Any]) -> str:
    """The message of the refusal, in one line; "" if the body is answered."""
    answer = server.post(CHAT, body)
    if answer.status_code == 200:
        return ""
    assert answer.status_code == 400, (answer.status_code, answer.text, str(body)[:300])
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    assert "internal" not in message
    return str(message)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source)[:40])
def test_no_source_of_a_video_is_a_fault_of_ours(watching: Running, source: Any) -> None:
    for part in ({"type": "video_url", "video_url": source}, {"type": "video", "video": source}):
        body = {"model": "echo-vl", "messages": [{"role": "user", "content": [part]}]}
        message = refused(watching, body)
        assert message.startswith("messages[0].content[0]"), message
        assert "picture" not in message.split(" (")[0], message


def test_no_field_of_a_video_is_a_fault_of_ours(watching: Running, url: str) -> None:
    for name in FIELDS:
        for value in ODD:
            assert name in refused(watching, asked(url, {name: value}))
            assert refused(watching, asked(url, mm_processor_kwargs={name: value}))
    assert not refused(watching, asked(url, {"timestamps": None, "fps": None}))


@pytest.mark.slow
def test_no_mangled_film_is_a_fault_of_ours(watching: Running, tmp_path: Path) -> None:
    dice = random.Random(3)
    told = Counter()
    for ending in ("mp4", "webm"):
        film(tmp_path / f"clip.{ending}", frames=6, size=(64, 64))
        data = (tmp_path / f"clip.{ending}").read_bytes()
        for _ in range(40):
            mangled = bytearray(data)
            for _ in range(dice.choice((1, 4, 30))):
                mangled[dice.randrange(len(mangled))] = dice.randrange(256)
            if dice.random() < 0.3:
                del mangled[dice.randrange(len(mangled)) :]
            message = refused(watching, asked(f"data:video/{ending};base64,{base64.b64encode(mangled).decode()}"))
            told["broken" in message or "no frames" in message] += 1
    assert min(told.values()) > 3, told


def test_a_server_may_allow_fewer_videos(serve: Any, url: str) -> None:
    server: Running = serve(EchoBackend(), media=MediaPolicy(allow_files=False, max_videos=1), max_images=0)
    assert server.post(CHAT, asked(url)).status_code == 200
    two = asked(url)
    two["messages"][0]["content"].append({"type": "video", "video": url})
    assert "2 videos in one request, where at most 1 are allowed" in refused(server, two)
    none: Running = serve(EchoBackend(), media=MediaPolicy(allow_files=False, max_videos=0))
    assert "1 videos in one request, where at most 0 are allowed" in refused(none, asked(url))
    answer = none.post("/v1/analyze", {"model": "echo-vl", "image": url})
    assert answer.status_code == 400
    assert "at most 0 are allowed" in answer.json()["error"]["message"]
