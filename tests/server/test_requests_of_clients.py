"""Requests as clients of other servers write them: what they carry along, say of pictures, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import Running, data_url, question
from tests.server.echo_backend import EchoBackend

CHAT, COMPLETIONS, RESPONSES, ANALYZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/analyze"
EVERYWHERE: dict[str, Any] = {
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "priority": 0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "logit_bias": {},
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "bad_words": [],
    "early_stopping": False,
    "prompt_logprobs": None,
    "vllm_xargs": {},
    "cache_salt": None,
    "kv_transfer_params": None,
    "service_tier": "auto",
    "store": False,
    "mm_processor_kwargs": {},
    "guided_choice": [],
    "guided_regex": "",
}
OF_CHAT: dict[str, Any] = {
    "echo": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": [],
    "top_logprobs": 0,
    "logprobs": False,
    "reasoning_effort": "none",
    "include_reasoning": True,
    "n": 1,
    "best_of": 1,
    "modalities": ["text"],
    "function_call": "auto",
    "functions": [],
    "audio": None,
    "verbosity": "medium",
    "separate_reasoning": True,
    "tools": [],
    "stop": [],
    "stop_token_ids": [],
    "chat_template_kwargs": {"enable_thinking": False, "thinking": None},
    "structured_outputs": {"json": None, "regex": None, "json_object": False, "disable_fallback": False},
    "response_format": {"type": "text", "json_schema": None},
    "include": [],
    "truncation": "disabled",
    "text": {"format": {"type": "text"}, "verbosity": None},
}
OF_COMPLETIONS: dict[str, Any] = {
    "echo": False,
    "best_of": 1,
    "n": 1,
    "suffix": None,
    "add_special_tokens": False,
    "logprobs": None,
    "response_format": {"type": "text"},
    "structured_outputs": {"json": None, "disable_any_whitespace": False},
    "metadata": {},
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "top_logprobs": 0,
    "chat_template_kwargs": {"enable_thinking": False},
}
OF_RESPONSES: dict[str, Any] = {
    "reasoning": {"effort": "none", "summary": None},
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "truncation": "disabled",
    "background": False,
    "conversation": None,
    "prompt": None,
    "max_tool_calls": None,
    "top_logprobs": 0,
    "include": [],
    "stream_options": {"include_obfuscation": False},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "n": 1,
    "logprobs": False,
    "stop": [],
    "stop_token_ids": [],
    "response_format": {"type": "text", "json_schema": None},
    "structured_outputs": {"choice": None},
    "chat_template_kwargs": {"enable_thinking": False},
    "modalities": ["text"],
}
BODIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, question("one two"), EVERYWHERE | OF_CHAT),
    (COMPLETIONS, {"prompt": "one two"}, EVERYWHERE | OF_COMPLETIONS),
    (RESPONSES, {"input": "one two"}, EVERYWHERE | OF_RESPONSES),
]


@pytest.mark.parametrize(("path", "body", "fields"), BODIES)
def test_fields_at_the_value_that_changes_nothing_are_accepted(
    server: Running, path: str, body: dict[str, Any], fields: dict[str, Any]
) -> None:
    for name, value in fields.items():
        answer = server.post(path, {**body, name: value})
        assert answer.status_code == 200, (name, answer.text)
    whole = server.post(path, {**body, **fields})
    assert whole.status_code == 200, whole.text
    # They are not in the key: it is the same question.
    assert whole.headers["x-qvl-cache"] == "hit"


@pytest.mark.parametrize(
    "extra",
    [
        {"min_tokens": 5},
        {"min_tokens": False},
        {"skip_special_tokens": False},
        {"use_beam_search": True},
        {"use_beam_search": 0},
        {"priority": 3},
        {"echo": True},
        {"reasoning_effort": "high"},
        {"logit_bias": {"5": 3}},
        {"web_search_options": {}},
        {"prediction": {"type": "content", "content": "x"}},
        {"modalities": ["text", "audio"]},
        {"length_penalty": 1.2},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"structured_outputs": {"choice": ["a"], "disable_fallback": True}},
        {"guided_choice": ["a"]},
        {"response_format": {"type": "text", "json_schema": {}}},
    ],
)
def test_fields_that_change_the_answer_are_refused_by_name(server: Running, extra: dict[str, Any]) -> None:
    answer = server.post(CHAT, {**question("x"), **extra})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(next(iter(extra)))


@pytest.mark.parametrize(("name", "value"), [("temperature", 9), ("temperature", 2.01), ("top_p", 1.5), ("top_p", 0)])
def test_ranges_are_those_of_openai_on_every_route(server: Running, name: str, value: float) -> None:
    bodies = [(path, body) for path, body, _ in BODIES]
    if name == "temperature":
        bodies.append((ANALYZE, {"image": data_url()}))
    for path, body in bodies:
        error = server.post(path, {**body, name: value}).json()["error"]
        assert error["param"] == name
        assert error["message"].startswith(f"{name}: ")
        assert server.post(path, {**body, "temperature": 2}).status_code == 200


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, question("one two three")), (COMPLETIONS, {"prompt": "one two three"})]
)
def test_usage_comes_with_every_event_where_it_is_asked_for(server: Running, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for _ in range(2):  # the second comes from the cache
        told = events(server.post(path, {**body, "stream": True, "stream_options": options}).text)
        counts = [event["usage"]["completion_tokens"] for event in told]
        assert counts == sorted(counts)
        assert counts[0] > 0
        assert told[-1]["choices"] == []
        # What is known with the last piece is the same as in the event that is all usage.
        assert told[-2]["usage"] == told[-1]["usage"]
        assert told[-1]["usage"]["prompt_tokens"] > 0
    plain = events(server.post(path, {**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert [event["usage"] for event in plain[:-1]] == [None] * (len(plain) - 1)


def test_best_of_asks_for_nothing_else_where_it_is_n(server: Running) -> None:
    body = {"prompt": "one two", "n": 2, "temperature": 1, "best_of": 2}
    assert len(server.post(COMPLETIONS, body).json()["choices"]) == 2
    assert len(events(server.post(COMPLETIONS, {**body, "stream": True}).text)) > 2
    for best_of in (0, 1, 3):
        error = server.post(COMPLETIONS, {**body, "best_of": best_of}).json()["error"]
        assert (error["param"], error["code"]) == ("best_of", "unsupported_parameter")
        assert error["message"].startswith(f"best_of={best_of}: ")


TEXT = {"type": "text", "text": "x"}
WRONG_PARTS: list[tuple[Any, str, str]] = [
    ({"type": "audio_url", "audio_url": {"url": "x"}}, ".type", "known: text, image_url"),
    ({"type": "image_url", "image_url": {"url": data_url(), "detail": "medium"}}, ".image_url.detail", "'medium'"),
    ({"type": "image_url", "image_url": {"detail": "low"}}, ".image_url.url", "is missing"),
    ({"type": "text"}, ".text", "is missing"),
    ({"type": "image_url", "image_url": "/etc/passwd"}, ".image_url", "paths are not accepted"),
    ({"type": "image", "image": "file:///etc/passwd"}, ".image", "paths are not accepted"),
    ({"type": "image", "data": "AAAA", "mimeType": "image/png"}, ".data", "not a picture"),
    ({"type": "image", "image": data_url(), "max_pixels": "9"}, ".max_pixels", "not a whole number"),
    ("hello", "", ""),
]


@pytest.mark.parametrize(("part", "place", "words"), WRONG_PARTS[:-1])
def test_a_wrong_part_is_named_on_every_route_as_in_the_sdk(server: Running, part: Any, place: str, words: str) -> None:
    error = server.post(CHAT, {"messages": [{"role": "user", "content": [TEXT, part]}]}).json()["error"]
    assert error["param"] == f"messages[0].content[1]{place}"
    assert error["message"].startswith(error["param"])
    assert words in error["message"]
    item = {"role": "user", "content": [{"type": "input_text", "text": "x"}, part]}
    other = server.post(RESPONSES, {"input": [{"type": "reasoning", "summary": []}, item]}).json()["error"]
    assert other["param"] == f"input[1].content[1]{place}"
    assert words in other["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {"messages": ["hello"]}, "messages[0]", "an object"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        (CHAT, {**question("x"), "tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (
            CHAT,
            {**question("x"), "tools": [{"type": "function", "function": {"name": 3}}]},
            "tools[0].function.name",
            "",
        ),
        (CHAT, {**question("x"), "tool_choice": "maybe"}, "tool_choice", "'required'"),
        (CHAT, {**question("x"), "tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        (
            CHAT,
            {**question("x"), "response_format": {"type": "xml"}},
            "response_format.type",
            "known: text, json_object",
        ),
        (
            CHAT,
            {**question("x"), "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
        (CHAT, {**question("x"), "stop": ["a", 3]}, "stop[1]", "string"),
        (RESPONSES, {"input": [{"type": "computer_call"}]}, "input[0].type", "known: message, function_call"),
        (RESPONSES, {"input": [{"content": "x"}]}, "input[0].role", "is missing"),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "is missing"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "is missing"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type", "known: text"),
        (RESPONSES, {"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "is missing"),
        (ANALYZE, {"images": [3]}, "images[0]", "string"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(
    server: Running, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


class Sizes(EchoBackend):
    """Says which sizes its pictures have."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    async def stream(self, request):  # type: ignore[no-untyped-def]
        self.sizes = [(picture.width, picture.height) for picture in request.pictures]
        async for chunk in super().stream(request):
            yield chunk


@pytest.mark.parametrize(
    ("limits", "wanted"), [({"max_pixels": 65536}, (288, 192)), ({"min_pixels": 500_000}, (832, 640))]
)
def test_pixel_limits_are_honoured_wherever_a_request_says_them(serve, limits: dict[str, int], wanted: Any) -> None:
    backend = Sizes()
    server = serve(backend, cache=None)
    url = data_url("red", (640, 480))
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {**question("x", url), **limits}),
        (CHAT, {**question("x", url), "mm_processor_kwargs": limits}),
        (ANALYZE, {"image": url, **limits}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}], **limits}),
    ]
    for part in (
        {"type": "image", "image": url, **limits},
        {"type": "image_url", "image_url": {"url": url}, **limits},
        {"type": "image_url", "image_url": {"url": url, **limits}},
        {"type": "image_url", "image_url": url, **limits},
    ):
        bodies.append((CHAT, {"messages": [{"role": "user", "content": [TEXT, part]}]}))
        bodies.append((RESPONSES, {"input": [{"role": "user", "content": [part]}]}))
    for path, body in bodies:
        backend.sizes = []
        answer = server.post(path, body, cache_control="no-store")
        assert backend.sizes == [wanted], (path, body.keys(), answer.text)


def test_two_pictures_of_other_clients_forms_are_read(server: Running) -> None:
    data = data_url("blue").partition(",")[2]
    content = [
        {"type": "text", "text": "which", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "image", "source_type": "base64", "data": data, "mime_type": "image/png"},
        {"type": "image", "data": data, "mimeType": "image/png"},
        {"type": "image_url", "image_url": {"url": data_url(), "detail": None}},
    ]
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 200, answer.text


class Shoe(BaseModel):
    brand: str
    price: int


def test_what_parse_returned_is_taken_back(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "shoe"}]
        first = client.chat.completions.parse(model="echo-vl", messages=messages, response_format=Shoe)
        message = first.choices[0].message
        assert message.parsed == Shoe(brand="x", price=0)
        for earlier in [message.model_dump(exclude_none=some, warnings=False) for some in (False, True)]:
            again = client.chat.completions.create(
                model="echo-vl", messages=[*messages, earlier, {"role": "user", "content": "more"}]
            )
            assert again.choices[0].message.content
        response = client.responses.parse(model="echo-vl", input="shoe", text_format=Shoe)
        assert client.responses.create(
            model="echo-vl",
            input=[{"role": "user", "content": "shoe"}, *response.output, {"role": "user", "content": "more"}],
        ).output_text
