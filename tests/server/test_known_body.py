"""Bodies that are equal but for their pictures are read once, and nobody can tell but by the clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from qvl.backends.base import Capabilities
from qvl.backends.openai.backend import OpenAIBackend
from qvl.pipeline.parse_request import Draft, draft_request
from qvl.server.known_body import LONGEST_KEPT, MOST_KEPT, KnownBody
from qvl.server.schemas import ChatCompletionRequest
from tests.scripted_endpoint import ScriptedEndpoint
from tests.server.conftest import Running, start
from tests.server.processes import CHAT
from tests.server.test_lift_pictures import noise, text_of, user

ONE, OTHER = (text_of(noise("JPEG", seed, edge=40)) for seed in (1, 2))


@pytest.fixture
def upstream() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as found:
        yield found


@pytest.fixture
def front(upstream: ScriptedEndpoint) -> Iterator[Running]:
    keys = ("first", "second")
    running = start(OpenAIBackend("echo", base_url=upstream.url, probe=False), cache="off", api_keys=keys)
    yield running
    running.stop()


def about(text: str, **more: Any) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{text}"
    return user({"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}) | more


def ask(front: Running, body: dict[str, Any], *, path: str = CHAT, key: str = "first", **headers: str) -> Any:
    return front.post(path, body, Authorization=f"Bearer {key}", **headers)


def read(front: Running) -> int:
    """The number of bodies that were read, and not found among those read before."""
    return int(front.core._known_bodies.cache_info().misses)


TOOL = {
    "name": "look_up",
    "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    "strict": True,
}
SCHEMA = {"type": "object", "properties": {"brand": {"type": "string", "maxLength": 9}}, "required": ["brand"]}
ASKED: dict[str, dict[str, Any]] = {
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "shoe", "schema": SCHEMA}}},
    "tools": {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    "allowed tools": {
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look_up"}}]},
        },
    },
    "sampling": {"temperature": 0.5, "seed": 7, "logit_bias": {"5": 1.5}, "stop": ["."], "max_completion_tokens": 3},
    "limits": {"mm_processor_kwargs": {"max_pixels": 5000, "fps": 2, "other": [1]}},
    "fields of others": {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}, "user": "me"},
    "a model": {"model": "echo"},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_the_same_question_of_another_picture_is_passed_on_as_if_it_were_new(
    front: Running, upstream: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    answers = [ask(front, about(text, **asked)) for text in (ONE, OTHER, OTHER)]
    assert [answer.status_code for answer in answers] == [200, 200, 200], answers[0].text
    assert read(front) == 1
    bodies = [chat.body for chat in upstream.chats]
    monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
    new = [ask(front, about(text, **asked)).status_code for text in (ONE, OTHER, OTHER)]
    assert new == [200, 200, 200]
    assert [chat.body for chat in upstream.chats[3:]] == bodies
    assert [chat.body["messages"][0]["content"][1]["image_url"]["url"][23:] for chat in upstream.chats[:3]] == [
        ONE,
        OTHER,
        OTHER,
    ]


SHOWN = {"type": "input_image", "image_url": f"data:image/jpeg;base64,{ONE}"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "model": "echo",
        "max_tokens": 5,
        "tools": [{"name": "look_up", "input_schema": TOOL["parameters"]}],
        **user({"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": ONE}}),
    },
    "/v1/responses": {
        "store": False,
        "tools": [{"type": "function", **TOOL}],
        "text": {"format": {"type": "json_schema", "name": "shoe", "schema": SCHEMA}},
        "input": [
            {"role": "user", "content": [SHOWN]},
            {"role": "assistant", "content": "Wait"},
            {"type": "function_call", "call_id": "1", "name": "look_up", "arguments": '{"code": "7"}'},
            {"type": "function_call_output", "call_id": "1", "output": "a shoe"},
        ],
    },
}


@pytest.mark.parametrize("path", ROUTES)
def test_other_routes_read_it_once_as_well(front: Running, upstream: ScriptedEndpoint, path: str) -> None:
    other = json.loads(json.dumps(ROUTES[path]).replace(ONE, OTHER))
    for body in (ROUTES[path], other, ROUTES[path]):
        answer = ask(front, body, path=path)
        assert answer.status_code == 200, answer.text
    assert read(front) == 1
    first, second, third = (chat.body for chat in upstream.chats)
    assert first == third
    assert json.loads(json.dumps(first).replace(ONE, OTHER)) == second


def test_each_asker_has_an_id_of_their_own(front: Running, upstream: ScriptedEndpoint) -> None:
    answers = [ask(front, about(ONE), X_Request_Id=name) for name in ("one", "other")]
    assert [answer.headers["x-request-id"] for answer in answers] == ["one", "other"]
    assert [chat.headers["x-request-id"] for chat in upstream.chats] == ["one", "other"]
    ids = {ask(front, about(ONE)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_nobody_finds_what_another_key_asked(front: Running) -> None:
    for key in ("first", "second", "first", "second"):
        assert ask(front, about(ONE), key=key).status_code == 200
    assert read(front) == 2


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"temperature": "warm"}, 400, "temperature"),
        ({"model": "nope"}, 404, "model"),
        # The fields of the body are told first.
        ({"model": "nope", "top_logprobs": 2}, 400, "top_logprobs"),
        ({"model": "nope", "stream_options": {}}, 400, "stream_options"),
        ({"stop": ["a"] * 300}, 400, "stop"),
    ],
)
def test_what_is_refused_is_refused_every_time(
    front: Running, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], status: int, param: str
) -> None:
    answers = [ask(front, about(text, **more), X_Request_Id="id") for text in (ONE, ONE, OTHER)]
    monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
    answers.append(ask(front, about(ONE, **more), X_Request_Id="id"))
    assert {(answer.status_code, answer.json()["error"]["param"]) for answer in answers} == {(status, param)}
    assert len({answer.text for answer in answers}) == 1


def test_few_are_kept_and_none_that_is_long(front: Running) -> None:
    for number in range(MOST_KEPT + 5):
        front.core.known_body(
            "", ChatCompletionRequest, json.dumps(user({"type": "text", "text": f"{number}?"})).encode()
        )
    assert front.core._known_bodies.cache_info().currsize == MOST_KEPT
    before = read(front)
    assert ask(front, about(ONE, user="x " * LONGEST_KEPT)).status_code == 200
    assert read(front) == before


def test_a_draft_is_made_again_for_a_backend_that_supports_something_else_and_for_another_adapter() -> None:
    known = KnownBody(ChatCompletionRequest, json.dumps(user({"type": "text", "text": "?"})).encode())
    have, made = Capabilities(images=1), list[Draft]()

    def make(adapter: str) -> Any:
        def draft() -> Draft:
            made.append(draft_request(known.body.messages, adapter=adapter))
            return made[-1]

        return draft

    for adapter in ("", "", "shoes", "shoes"):
        assert known.draft(have, adapter, make(adapter)) is made[-1]
    assert len(made) == 2
    assert known.draft(replace(have), "shoes", make("shoes")) is made[1]
    assert known.draft(replace(have, tools=True), "shoes", make("shoes")) is made[2]


def test_a_draft_that_fails_is_tried_again() -> None:
    known = KnownBody(ChatCompletionRequest, json.dumps(user({"type": "text", "text": "?"})).encode())

    def fail() -> Draft:
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$"):
            known.draft(Capabilities(), "", fail)
    draft = draft_request(known.body.messages)
    assert known.draft(Capabilities(), "", lambda: draft) is draft


def test_documents_of_text_that_could_be_base64_keep_their_text_and_their_answers(upstream: ScriptedEndpoint) -> None:
    running = start(OpenAIBackend("echo", base_url=upstream.url, probe=False), cache="memory:")
    try:
        for text in ("ACGT" * 300, "TTTT" * 300, "ACGT" * 5000, "TTTT" * 5000):
            source = {"type": "text", "media_type": "text/plain", "data": text}
            body = user({"type": "document", "source": source}, {"type": "text", "text": "say it"})
            answer = running.post("/v1/messages", {"model": "echo", "max_tokens": 9, **body})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-qvl-cache"] == "miss"
            assert text in json.dumps(upstream.chats[-1].body)
    finally:
        running.stop()
