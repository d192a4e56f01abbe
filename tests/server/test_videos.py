"""Videos over HTTP: `video_url` as vLLM's clients send it, with the frames in the usage."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.media.films import film, sound_alone
from tests.server.echo_backend import EchoBackend

if TYPE_CHECKING:
    from tests.server.conftest import Running

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
