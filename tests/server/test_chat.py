"""`POST /v1/chat/completions` over a real uvicorn."""

from __future__ import annotations

import json

from tests.server.conftest import Running, data_url, question


def test_a_picture_is_answered(server: Running) -> None:
    answer = server.post("/v1/chat/completions", question("what colour", data_url("red")))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["content"] == "red 64x64, what colour"
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert answer.headers["x-request-id"].startswith("qvl-")


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_has_role_deltas_reason_usage_and_done(server: Running) -> None:
    body = question("count to three", data_url("blue")) | {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found[:-1]) == "blue 64x64, count to three"
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] > 0
    assert all(event["usage"] is None for event in found[:-1])
    assert len({event["id"] for event in found}) == 1
