"""OpenAI's own client, synchronous and asynchronous, over a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel

from tests.server.conftest import Running, data_url, question

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Shoe(BaseModel):
    brand: str
    price: int


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def messages(text: str, *pictures: str) -> list:
    return question(text, *pictures)["messages"]


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo-vl"]
    assert client.models.retrieve("echo-vl").owned_by == "qvl"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-7")
    assert caught.value.code == "model_not_found"


def test_pictures_keep_their_order(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="echo-vl", messages=messages("which", data_url("red"), data_url("green", (32, 48)), data_url("blue"))
    )
    assert found.choices[0].message.content == "red 64x64, green 32x48, blue 64x64, which"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.system_fingerprint


def test_a_stream_is_the_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo-vl",
        messages=messages("one two three"),
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
    assert chunks[-1].usage is not None
    told = [
        item
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for item in chunk.choices[0].logprobs.content or ()
    ]
    assert "".join(item.token for item in told) == "one two three"
    assert all(len(item.top_logprobs) == 2 for item in told)


def test_the_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo-vl", messages=messages("one two three")) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "one two three"


def test_n_logprobs_stop_and_length(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="echo-vl", messages=messages("one two three"), n=3, logprobs=True, stop=["three"]
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.choices[0].message.content == "one two "
    assert found.choices[2].logprobs is not None
    short = client.chat.completions.create(model="echo-vl", messages=messages("one two three"), max_tokens=1)
    assert short.choices[0].finish_reason == "length"
    assert short.choices[0].message.content == "one"


def test_parse_gives_the_model(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="echo-vl", messages=messages("shoe"), response_format=Shoe)
    assert found.choices[0].message.parsed == Shoe(brand="x", price=0)


def test_json_object(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="echo-vl", messages=messages("shoe"), response_format={"type": "json_object"}
    )
    assert json.loads(found.choices[0].message.content or "")


def test_tools_are_called_and_answered(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="echo-vl", messages=messages("use get_weather"), tools=[WEATHER], tool_choice="auto"
    )
    call = first.choices[0].message.tool_calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "x"}
    again = client.chat.completions.create(
        model="echo-vl",
        messages=[
            *messages("use get_weather"),
            first.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
            {"role": "user", "content": "and now?"},
        ],
        tools=[WEATHER],
    )
    assert again.choices[0].message.content == "and now?"
    streamed = client.chat.completions.create(
        model="echo-vl",
        messages=messages("go"),
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        stream=True,
    )
    calls = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather"
    assert json.loads("".join(c.function.arguments or "" for c in calls)) == {"city": "x"}


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="echo-vl", prompt=["one two", "three"], logprobs=1)
    assert [choice.text for choice in found.choices] == ["one two", "three"]
    assert found.choices[0].logprobs.text_offset == [0, 3]
    stream = client.completions.create(
        model="echo-vl", prompt="one two three", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "one two three"
    assert chunks[-1].usage.completion_tokens == 3


def test_responses(client: openai.OpenAI) -> None:
    found = client.responses.create(
        model="echo-vl",
        instructions="be brief",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url("yellow"), "detail": "auto"},
                    {"type": "input_text", "text": "colour"},
                ],
            }
        ],
    )
    assert found.output_text == "yellow 64x64, colour"
    assert found.status == "completed"
    assert found.usage.input_tokens_details.cached_tokens == 0
    short = client.responses.create(model="echo-vl", input="one two three", max_output_tokens=1)
    assert short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"


def test_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo-vl", input="one two three") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "one two three"
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.output_text.done" in kinds


def test_responses_stream_about_pictures(client: openai.OpenAI) -> None:
    parts = [
        {"type": "input_image", "image_url": data_url("red"), "detail": "auto"},
        {"type": "input_image", "image_url": data_url("blue", (40, 30)), "detail": "auto"},
        {"type": "input_text", "text": "which"},
    ]
    with client.responses.stream(model="echo-vl", input=[{"role": "user", "content": parts}]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == "red 64x64, blue 40x30, which"
    assert final.usage.input_tokens_details.image_tokens > 0


def test_a_stream_of_several_choices_keeps_them_apart(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo-vl", messages=messages("one two"), n=3, stream=True, logprobs=True, top_logprobs=1
    )
    texts, ended = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ended[choice.index] = choice.finish_reason or ended.get(choice.index)
    assert len(texts) == 3
    assert all(text.endswith("one two") for text in texts.values())
    assert set(ended.values()) == {"stop"}


def test_responses_call_functions(client: openai.OpenAI) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    found = client.responses.create(model="echo-vl", input="use get_weather", tools=[tool])
    call = found.output[0]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "x"}
    again = client.responses.create(
        model="echo-vl",
        input=[
            {"role": "user", "content": "weather?"},
            call,
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
    )
    assert again.output_text == "sunny"
    with client.responses.stream(model="echo-vl", input="use get_weather", tools=[tool]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[0].arguments == call.arguments


def test_responses_parse(client: openai.OpenAI) -> None:
    found = client.responses.parse(model="echo-vl", input="shoe", text_format=Shoe)
    assert found.output_parsed == Shoe(brand="x", price=0)


def test_unknown_fields_are_refused_by_name(client: openai.OpenAI) -> None:
    for extra in ({"logit_bias": {"1": 5}}, {"reasoning_effort": "low"}, {"store": True}, {"frobnicate": 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="echo-vl", messages=messages("x"), extra_body=extra)
        assert caught.value.param == next(iter(extra))
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="echo-vl", input="x", conversation="conv_1")


def test_vllm_fields_are_honoured(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="echo-vl",
        messages=messages("one two"),
        max_tokens=6,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [3]},
    )
    assert found.usage.completion_tokens == 6
    small = client.chat.completions.create(
        model="echo-vl", messages=messages("x", data_url("red", (256, 256))), extra_body={"max_pixels": 128 * 128}
    )
    assert small.choices[0].message.content == "red 128x128, x"


def test_detail_low_is_a_smaller_picture(client: openai.OpenAI) -> None:
    url = data_url("red", (1024, 1024))
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    body = [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]
    found = client.chat.completions.create(model="echo-vl", messages=body)
    assert found.choices[0].message.content == "red 512x512, x"


def test_async_client(server: Running) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            found = await client.chat.completions.create(model="echo-vl", messages=messages("hello"))
            assert found.choices[0].message.content == "hello"
            stream = await client.chat.completions.create(model="echo-vl", messages=messages("a b"), stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "a b"

    asyncio.run(ask())
