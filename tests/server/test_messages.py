"""The Messages API through Anthropic's own client, and by hand where that would not let a fault through."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from qvl.errors import BackendResponseError
from qvl.types import ChatRequest, Chunk, Usage
from tests.server.conftest import Running, picture, start
from tests.server.echo_backend import EchoBackend

PATH = "/v1/messages"
RED = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture("red")).decode()},
}
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo-vl", "max_tokens": 64, "messages": [{"role": "user", "content": text}], **fields}


def client_of(server: Running, key: str = "none", **options: Any) -> Any:
    return anthropic.Anthropic(**{"base_url": server.url, "api_key": key, "max_retries": 0} | options)


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return client_of(server)


def test_a_question_about_pictures(client: Any, server: Running) -> None:
    content = [RED, {"type": "text", "text": "what"}]
    answer = client.messages.create(**asked("", messages=[{"role": "user", "content": content}]))
    assert [block.text for block in answer.content] == ["red 64x64, what"]
    assert (answer.role, answer.stop_reason, answer.model) == ("assistant", "end_turn", "echo-vl")
    assert answer.usage.input_tokens > 0 < answer.usage.output_tokens
    assert answer._request_id.startswith("qvl-")


@pytest.mark.parametrize("system", ["be brief", [{"type": "text", "text": "be brief", "cache_control": None}]])
def test_system_is_text_or_blocks(client: Any, server: Running, system: Any) -> None:
    client.messages.create(**asked("hello", system=system))
    first = server.backend.requests[-1].messages[0]
    assert (first.role, first.text) == ("system", "be brief")


def test_sampling_reaches_the_model(client: Any, server: Running) -> None:
    extra = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7}
    client.messages.create(**asked("hello", stop_sequences=["END"], extra_body=extra))
    sampling = server.backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.9, 7)
    assert (sampling.stop, sampling.max_tokens) == (("END",), 64)


def test_an_answer_that_is_cut_off_says_so(client: Any) -> None:
    assert client.messages.create(**asked("one two three", max_tokens=1)).stop_reason == "max_tokens"


def test_streamed_text_is_the_answer(client: Any) -> None:
    with client.messages.stream(**asked("one two three")) as stream:
        assert "".join(stream.text_stream) == "one two three"
        whole = stream.get_final_message()
    assert whole.content[0].text == "one two three"
    assert whole.stop_reason == "end_turn"
    assert whole.usage.input_tokens > 0 < whole.usage.output_tokens


def test_a_tool_is_called_and_its_result_with_a_picture_answered(client: Any, server: Running) -> None:
    first = client.messages.create(**asked("use get_weather", tools=[WEATHER]))
    (call,) = first.content
    assert (first.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
    assert isinstance(call.input, dict)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "see"}, RED]}
    history = [
        {"role": "user", "content": "use get_weather"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "and now"}]},
    ]
    again = client.messages.create(**asked("", messages=history, tools=[WEATHER]))
    assert again.content[0].text.endswith("and now")
    told = server.backend.requests[-1].messages
    assert [message.role for message in told] == ["user", "assistant", "tool", "user"]
    assert told[1].tool_calls[0].id == told[2].tool_call_id == call.id
    assert len(told[2].pictures) == 1


@pytest.mark.parametrize(
    ("told", "want"),
    [
        ({}, "no such city"),
        ({"is_error": False}, "no such city"),
        ({"is_error": True}, "error: no such city"),
        ({"is_error": True, "content": [{"type": "text", "text": "no such city"}, RED]}, "error: no such city"),
        ({"is_error": True, "content": [RED]}, "error: "),
        ({"is_error": True, "content": ""}, "error"),
    ],
)
def test_a_model_is_told_that_its_tool_failed(server: Running, told: dict[str, Any], want: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": "no such city", **told}
    history = [
        {"role": "user", "content": "use get_weather"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    assert server.post(PATH, asked("", messages=history, tools=[WEATHER])).status_code == 200
    shown = server.backend.requests[-1].messages[-1]
    seen = int(RED in list(result["content"]))
    assert (shown.role, shown.text, len(shown.pictures)) == ("tool", want, seen)


def test_a_tool_runner_tells_a_failure_and_sends_the_whole_conversation(client: Any, server: Running) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Tell the weather of a city."""
        raise RuntimeError("no such city")

    runner = client.beta.messages.tool_runner(**asked("use get_weather"), tools=[get_weather], max_iterations=2)
    stops = [message.stop_reason for message in runner]
    assert (stops[0], len(stops)) == ("tool_use", 2)
    told = server.backend.requests[-1].messages
    assert [message.role for message in told] == ["user", "assistant", "tool"]
    assert told[2].text.startswith("error: ")
    assert "no such city" in told[2].text


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
def test_a_conversation_held_by_the_server_is_refused_as_the_client_expects_it(
    server: Running, path: str, thread: dict[str, Any]
) -> None:
    answer = server.post(path, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "thread": thread})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert error["message"].startswith("thread: ")


def test_streamed_calls_add_up(client: Any) -> None:
    with client.messages.stream(**asked("use get_weather", tools=[WEATHER])) as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_message().content
    assert "input_json" in kinds
    assert (call.type, call.name) == ("tool_use", "get_weather")
    assert isinstance(call.input, dict)


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "get_weather"}, "get_weather"),
    ],
)
def test_tool_choices(client: Any, server: Running, choice: dict[str, Any], want: str) -> None:
    client.messages.create(**asked("hello", tools=[WEATHER], tool_choice=choice))
    assert server.backend.requests[-1].tool_choice == want
    choice = {**choice, "disable_parallel_tool_use": True} if want != "none" else choice
    client.messages.create(**asked("hello", tools=[WEATHER], tool_choice=choice))
    assert server.backend.requests[-1].parallel_tool_calls == (want == "none")


def test_a_schema_of_the_answer(client: Any) -> None:
    schema = {"type": "object", "properties": {"brand": {"type": "string"}}, "required": ["brand"]}
    answer = client.messages.create(
        **asked("shoe", output_config={"format": {"type": "json_schema", "schema": schema}})
    )
    assert set(json.loads(answer.content[0].text)) == {"brand"}


def test_a_plain_text_document_is_read(client: Any, server: Running) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "It rains."}
    document = {"type": "document", "title": "Weather", "source": source}
    client.messages.create(**asked("", messages=[{"role": "user", "content": [document]}]))
    assert server.backend.requests[-1].messages[-1].text == "Weather\nIt rains."


class Thinker(EchoBackend):
    """Thinks aloud before it answers; breaks off when it is told to."""

    async def stream(self, request: ChatRequest) -> Any:
        for piece in ("let me ", "see"):
            yield Chunk(reasoning=piece)
        yield Chunk(text="it is red")
        if "break" in request.messages[-1].text:
            raise BackendResponseError("the engine stumbled")
        yield Chunk(finish_reason="stop", usage=Usage(7, 5, cached_tokens=4))


@pytest.fixture(scope="module")
def thinker() -> Iterator[Running]:
    running = start(Thinker())
    yield running
    running.stop()


def test_thoughts_stand_in_signed_blocks_of_their_own_and_may_be_sent_back(thinker: Running) -> None:
    client = client_of(thinker)
    answer = client.messages.create(**asked("what"))
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert (answer.content[0].thinking, len(answer.content[0].signature)) == ("let me see", 64)
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (3, 4)
    with client.messages.stream(**asked("what")) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert "thinking" in kinds
    assert [block.model_dump(exclude_none=True) for block in streamed.content] == [
        block.model_dump(exclude_none=True) for block in answer.content
    ]
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": "b"},
    ]
    assert client.messages.create(**asked("", messages=history)).content[-1].text == "it is red"


def test_thoughts_can_be_left_out(thinker: Running) -> None:
    hidden = {"type": "adaptive", "display": "omitted"}
    answer = client_of(thinker).messages.create(**asked("what", thinking=hidden))
    assert answer.content[0].thinking == ""
    assert answer.content[0].signature


def test_reasoning_that_is_not_wanted_is_in_no_block(thinker: Running) -> None:
    body = asked("what", include_reasoning=False)
    whole = thinker.post(PATH, body).json()
    assert [block["type"] for block in whole["content"]] == ["text"]
    streamed = thinker.post(PATH, {**body, "stream": True}).text
    assert "thinking_delta" not in streamed
    assert "signature" not in streamed
    assert '"text":"it is red"' in streamed
    assert streamed.count("event: content_block_start") == 1
    assert '"index":0' in streamed


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens", "/v1/responses"])
def test_a_request_has_the_id_that_its_client_gave_it(server: Running, path: str) -> None:
    body = {"model": "echo-vl", "input": "x"} if "responses" in path else asked("x")
    told = server.post(path, {**body, "request_id": "night-7"})
    assert told.headers["x-request-id"] == "night-7"


def test_an_error_in_a_stream_is_an_event_of_its_own(thinker: Running) -> None:
    told = thinker.post(PATH, asked("break", stream=True)).text
    last = told.rstrip().rsplit("\n\n", 1)[1]
    assert last.startswith("event: error\n")
    body = json.loads(last.partition("data: ")[2])
    assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    with pytest.raises(anthropic.APIStatusError), client_of(thinker).messages.stream(**asked("break")) as stream:
        list(stream)


def test_an_error_in_the_stream_of_a_response_has_its_number(thinker: Running) -> None:
    told = thinker.post("/v1/responses", {"input": "break", "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[-1]["type"], len(events) > 1) == ("error", True)
    assert events[-1].keys() == {"type", "sequence_number", "code", "message", "param"}


def test_events_fit_anthropics_own_types(server: Running, thinker: Running) -> None:
    from anthropic.types import RawMessageStreamEvent
    from pydantic import TypeAdapter

    reader = TypeAdapter(RawMessageStreamEvent)
    for running, body in ((server, asked("use get_weather", tools=[WEATHER])), (thinker, asked("what"))):
        lines = running.post(PATH, {**body, "stream": True}).text.splitlines()
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        told = [event for event in data if event["type"] != "ping"]
        for event in told:
            reader.validate_python(event, strict=True)
        starts = [event["index"] for event in told if event["type"] == "content_block_start"]
        assert starts == list(range(len(starts)))
        assert starts == [event["index"] for event in told if event["type"] == "content_block_stop"]


def test_errors_are_anthropics(serve) -> None:
    server = serve(api_keys=("right",), max_body_bytes=4096, requests_per_minute=8)
    client = client_of(server, "right")
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client_of(server, "wrong").messages.create(**asked("x"))
    assert caught.value.body["error"]["type"] == "authentication_error"
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client_of(server, "wrong").models.list()
    assert caught.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**asked("x") | {"model": "other"})
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.RequestTooLargeError) as caught:
        client.messages.create(**asked("x" * 5000))
    assert caught.value.body["error"]["type"] == "request_too_large"
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**asked("x", max_tokens=0))
    assert caught.value.body["error"] == {
        "type": "invalid_request_error",
        "message": "max_tokens: Input should be greater than or equal to 1",
    }
    for _ in range(8):
        server.post(PATH, asked("x"), x_api_key="right")
    with pytest.raises(anthropic.RateLimitError) as caught:
        client.messages.create(**asked("x"))
    assert caught.value.body["error"]["type"] == "rate_limit_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_full_queue_is_overloaded(serve) -> None:
    server = serve(EchoBackend(pause=0.2), max_concurrent=1, max_queue=0)
    with server.client() as held, held.stream("POST", PATH, json=asked("one two three four", stream=True)) as slow:
        next(slow.iter_lines())
        with pytest.raises(anthropic.APIStatusError) as caught:
            client_of(server).messages.create(**asked("x"))
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (529, "overloaded_error")
    assert "retry-after" in caught.value.response.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "name": "get_weather"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"n": 2}, "n"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]},
            "messages[0].content[0].input",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "file"}}]}]},
            "messages[0].content[0].source.type",
        ),
        ({"system": [RED]}, "system[0].type"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": "false"}]}
                ]
            },
            "messages[0].content[0].is_error",
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_name(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, {**asked("x"), **fields})
    body = answer.json()
    assert (answer.status_code, body["type"]) == (400, "error")
    assert body["error"]["message"].startswith(param) or repr(param) in body["error"]["message"], body


def test_a_broken_picture_is_named_in_a_result_too(server: Running) -> None:
    broken = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [RED, broken]}
    answer = server.post(PATH, asked("", messages=[{"role": "user", "content": [RED, result]}]))
    assert answer.status_code == 400
    assert "messages[0].content[1].content[1].source" in answer.json()["error"]["message"]


def test_a_method_that_is_not_there(server: Running) -> None:
    answer = server.get(PATH)
    assert (answer.status_code, answer.json()["type"], answer.headers["allow"]) == (405, "error", "POST")


def test_models_are_listed_for_anthropics_client(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["echo-vl"]
    assert client.models.retrieve("echo-vl").max_input_tokens == 4096


@pytest.fixture(scope="module")
def named() -> Iterator[Running]:
    running = start(served_model_names=("a", "b", "c", "d", "e"))
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("query", "names", "more"),
    [
        ({}, "abcde", False),
        ({"limit": 2}, "ab", True),
        ({"limit": 5}, "abcde", False),
        ({"limit": 2, "after_id": "b"}, "cd", True),
        ({"limit": 2, "after_id": "c"}, "de", False),
        ({"after_id": "e"}, "", False),
        ({"limit": 2, "before_id": "d"}, "bc", True),
        ({"limit": 2, "before_id": "c"}, "ab", False),
        ({"before_id": "a"}, "", False),
        ({"limit": 1, "beta": "true"}, "a", True),
    ],
)
def test_models_are_listed_in_pages(named: Running, query: dict[str, Any], names: str, more: bool) -> None:
    with named.client(headers={"anthropic-version": "2023-06-01"}, params=query) as client:
        page = client.get("/v1/models").json()
    assert ("".join(model["id"] for model in page["data"]), page["has_more"]) == (names, more)
    assert (page["first_id"], page["last_id"]) == ((names[0], names[-1]) if names else (None, None))


def test_every_page_of_models_is_found_from_both_ends(named: Running) -> None:
    with client_of(named) as client:
        assert [model.id for model in client.models.list(limit=2)] == [*"abcde"]
        assert [model.id for model in client.models.list(limit=2, before_id="e")] == [*"cdab"]
        assert [model.id for model in client.beta.models.list(limit=2)] == [*"abcde"]
        assert {model.lifecycle for model in client.models.list()} == {"active"}


@pytest.mark.parametrize(
    ("path", "status", "kind", "words"),
    [
        ("/v1/models?limit=0", 400, "invalid_request_error", "limit must be 1 to 1000"),
        ("/v1/models?limit=x", 400, "invalid_request_error", "limit must be 1 to 1000"),
        ("/v1/models?after_id=zzz", 400, "invalid_request_error", "after_id: no model 'zzz'"),
        ("/v1/models?before_id=", 400, "invalid_request_error", "before_id: no model ''"),
        ("/v1/models?before_id=a&after_id=b", 400, "invalid_request_error", "exclude each other"),
        ("/v1/models?order=asc", 400, "invalid_request_error", "unknown parameter 'order'"),
        ("/v1/models/zzz", 404, "not_found_error", "'zzz'"),
    ],
)
def test_what_is_wrong_about_models_is_told_to_anthropics_client_in_its_form(
    named: Running, path: str, status: int, kind: str, words: str
) -> None:
    answer = named.get(path, anthropic_version="2023-06-01")
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert words in answer.json()["error"]["message"]
    assert answer.headers["request-id"] == answer.json()["request_id"]


def test_counting_needs_a_backend_that_tells_its_tokens(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="does not tell its tokens"):
        client.messages.count_tokens(model="echo-vl", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/messages/x/y"])
def test_a_path_that_there_is_not_is_told_in_the_same_form(server: Running, path: str) -> None:
    answer = server.get(path)
    assert (answer.status_code, answer.json()["type"]) == (404, "error")
    assert answer.json()["error"] == {"type": "not_found_error", "message": "path not found"}
