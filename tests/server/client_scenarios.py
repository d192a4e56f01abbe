"""What an application does with OpenAI's client, whichever version of it is installed.

    python client_scenarios.py URL MODEL PICTURE WORD

asks the server at URL about PICTURE (a file); WORD must be in the answer. Prints the client's version and what passed.
A script, since two versions of one package cannot live in one process.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import openai
from pydantic import BaseModel

QUESTION = "What brand is it?"
# Values of a closed set, so that a model of any size gives an answer that ends.
SIZES = ("small", "large")
TOOL = {
    "name": "pick_size",
    "description": "Picks a size",
    "parameters": {
        "type": "object",
        "properties": {"size": {"type": "string", "enum": list(SIZES)}},
        "required": ["size"],
        "additionalProperties": False,
    },
}


class Choice(BaseModel):
    size: Literal["small", "large"]


class Application:
    def __init__(self, url: str, model: str, picture: Path, word: str) -> None:
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        self.other = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        self.model = model
        self.word = word
        self.url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"

    def messages(self, text: str = QUESTION) -> list[Any]:
        image = {"type": "image_url", "image_url": {"url": self.url}}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

    def items(self) -> list[Any]:
        image = {"type": "input_image", "image_url": self.url, "detail": "auto"}
        return [{"role": "user", "content": [image, {"type": "input_text", "text": QUESTION}]}]

    def models(self) -> None:
        assert self.model in [model.id for model in self.client.models.list()]
        assert self.client.models.retrieve(self.model).object == "model"

    def chat(self) -> str:
        found = self.client.chat.completions.create(model=self.model, messages=self.messages())
        text = found.choices[0].message.content
        assert self.word in text.lower(), text
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.prompt_tokens_details.cached_tokens is not None
        assert found.usage.prompt_tokens + found.usage.completion_tokens == found.usage.total_tokens
        return text

    def batch(self) -> None:
        body = {"model": self.model, "messages": self.messages()}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
        sent = self.client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        made = self.client.batches.create(
            input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while made.status not in ("completed", "failed"):
            time.sleep(0.1)
            made = self.client.batches.retrieve(made.id)
        answer = json.loads(self.client.files.content(made.output_file_id).text)
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == self.chat()
        assert made.id in [one.id for one in self.client.batches.list()]
        assert {sent.id, made.output_file_id} <= {one.id for one in self.client.files.list()}
        assert self.client.files.delete(sent.id).deleted

    def stream(self) -> None:
        asked = self.client.chat.completions.create(
            model=self.model, messages=self.messages(), stream=True, stream_options={"include_usage": True}
        )
        chunks = list(asked)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == self.chat()
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens > 0
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"

    def stream_helper(self) -> None:
        with self.client.chat.completions.stream(model=self.model, messages=self.messages()) as events:
            for _ in events:
                pass
            assert self.word in events.get_final_completion().choices[0].message.content.lower()

    def choices_and_logprobs(self) -> None:
        found = self.client.chat.completions.create(
            model=self.model, messages=self.messages(), n=2, logprobs=True, top_logprobs=2, seed=1, temperature=0.5
        )
        assert [choice.index for choice in found.choices] == [0, 1]
        for choice in found.choices:
            assert "".join(token.token for token in choice.logprobs.content)
            assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)

    def parse(self) -> None:
        found = self.client.chat.completions.parse(
            model=self.model, messages=self.messages("Pick a size."), response_format=Choice
        )
        assert found.choices[0].message.parsed.size in SIZES

    def tools(self) -> None:
        tool = {"type": "function", "function": TOOL}
        asked: dict[str, Any] = {"model": self.model, "tools": [tool], "tool_choice": "required"}
        first = self.client.chat.completions.create(messages=self.messages("use pick_size"), **asked)
        call = first.choices[0].message.tool_calls[0]
        assert first.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "pick_size"
        assert json.loads(call.function.arguments)["size"] in SIZES
        streamed = self.client.chat.completions.create(messages=self.messages("use pick_size"), stream=True, **asked)
        calls = [c for chunk in streamed if chunk.choices for c in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(c.function.arguments or "" for c in calls) == call.function.arguments
        again = self.client.chat.completions.create(
            model=self.model,
            messages=[
                *self.messages("use pick_size"),
                first.choices[0].message,
                {"role": "tool", "tool_call_id": call.id, "content": "done"},
                *self.messages(),
            ],
        )
        assert again.choices[0].message.content

    def responses(self) -> None:
        found = self.client.responses.create(model=self.model, input=self.items(), store=False)
        assert self.word in found.output_text.lower()
        assert found.status == "completed"
        with self.client.responses.stream(model=self.model, input=self.items(), store=False) as events:
            kinds = [event.type for event in events]
            final = events.get_final_response()
        assert final.output_text == found.output_text
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        parsed = self.client.responses.parse(model=self.model, input="Pick a size.", text_format=Choice)
        assert parsed.output_parsed.size in SIZES
        tool = {"type": "function", **TOOL, "strict": True}
        called = self.client.responses.create(
            model=self.model, input="use pick_size", tools=[tool], tool_choice="required"
        )
        call = next(item for item in called.output if item.type == "function_call")
        assert json.loads(call.arguments)["size"] in SIZES

    def completions(self) -> None:
        found = self.client.completions.create(model=self.model, prompt="one two", max_tokens=4)
        assert found.choices[0].finish_reason in ("stop", "length")
        streamed = self.client.completions.create(model=self.model, prompt="one two", max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text

    def headers(self) -> None:
        raw = self.client.chat.completions.with_raw_response.create(model=self.model, messages=self.messages())
        assert raw.headers["x-qvl-cache"] in ("hit", "miss", "bypass")
        assert raw.parse()._request_id == raw.headers["x-request-id"]

    def errors(self) -> None:
        for change, kind, param in (
            ({"model": "gpt-7"}, openai.NotFoundError, "model"),
            ({"temperature": -1}, openai.BadRequestError, "temperature"),
            ({"extra_body": {"logit_bias": {"1": 101}}}, openai.BadRequestError, "logit_bias"),
        ):
            found: Any = None
            try:
                found = self.client.chat.completions.create(
                    **{"model": self.model, "messages": self.messages(), **change}  # type: ignore[arg-type]
                )
            except kind as caught:
                found = caught
            assert isinstance(found, kind), found
            assert (found.param, bool(found.request_id)) == (param, True)

    def asynchronous(self) -> None:
        async def ask() -> None:
            async with self.other as client:
                chat = client.chat.completions
                found = await chat.create(model=self.model, messages=self.messages())
                stream = await chat.create(model=self.model, messages=self.messages(), stream=True)
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                assert "".join(pieces) == found.choices[0].message.content
                parsed = await chat.parse(model=self.model, messages=self.messages("Size?"), response_format=Choice)
                assert parsed.choices[0].message.parsed.size in SIZES
                told = await client.responses.create(model=self.model, input=self.items())
                assert self.word in told.output_text.lower()
                events = [
                    event
                    async for event in await client.responses.create(model=self.model, input=self.items(), stream=True)
                ]
                assert events[-1].response.output_text == told.output_text

        asyncio.run(ask())


SCENARIOS = (
    Application.models,
    Application.chat,
    Application.batch,
    Application.stream,
    Application.stream_helper,
    Application.choices_and_logprobs,
    Application.parse,
    Application.tools,
    Application.responses,
    Application.completions,
    Application.headers,
    Application.errors,
    Application.asynchronous,
)


def main(url: str, model: str, picture: str, word: str) -> None:
    application = Application(url, model, Path(picture), word)
    for scenario in SCENARIOS:
        scenario(application)
    names = ", ".join(scenario.__name__ for scenario in SCENARIOS)
    print(f"openai {openai.__version__}: {names}")


if __name__ == "__main__":
    main(*sys.argv[1:])
