"""The APIs that a run can load: the path of each, a request in its form, and its answers.

A line of the input is read in OpenAI's chat form. `ChatApi` sends it as it is; the others write it in their own form,
and refuse by name what they have no form for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final

from qvl.backends.openai.answer_reader import read_usage
from qvl.backends.openai.wire import WireUsage
from qvl.bench.timed_answer import TimedAnswer
from qvl.errors import ConfigError
from qvl.sampling import SamplingParams
from qvl.suggest import nearest
from qvl.types import JsonMapping, JsonObject

CHAT_FIELDS: Final = (SamplingParams.names() - {"n"}) | {
    "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
}  # fmt: skip
"""Fields of a chat request that a line may set."""
MESSAGES_MAX_TOKENS: Final = 1024
"""Anthropic's API has no default of its own."""


class NoRequestError(ValueError):
    """A row that is not a valid request; the message is the reason."""


class BenchApi:
    """One API of an endpoint, and the fields of every request.

    Args:
        params: fields to set in every request, by their names in chat; they override those that a line sets.
        stream: True to ask for streams, where the API has them.

    Attributes:
        name: as `--target` names it.
        path: behind the base URL.
        streams: True if answers can be streamed, so that they have a time to first token.
        counts_pictures: True if usage can have the tokens of pictures.
        fields: further fields that a line may set.
        input_field: the field by which a line is known as a whole request of this API; "" if none is.
        renamed: names of fields in chat, and what they are called here.
        absent: fields of chat that are refused, since there is nothing of the kind here.
    """

    name: ClassVar[str] = "chat"
    path: ClassVar[str] = "/chat/completions"
    streams: ClassVar[bool] = True
    counts_pictures: ClassVar[bool] = True
    fields: ClassVar[frozenset[str]] = frozenset()
    input_field: ClassVar[str] = ""
    renamed: ClassVar[Mapping[str, str]] = {}
    absent: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: JsonMapping | None = None, *, stream: bool = True) -> None:
        self.params = dict(params or {})
        self.stream = stream and self.streams

    def headers(self, key: str | None) -> dict[str, str]:
        """Return the headers that the API asks for, with the API key if there is one."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, messages: Sequence[JsonObject], params: JsonMapping) -> JsonObject:
        """Return the request without its model; without `messages`, `params` are a whole request of this API.

        Raises:
            NoRequestError: the API has no form for a part of it.
        """
        params = {**params, **self.params}
        if unknown := sorted(self.absent & params.keys()):
            raise self._refused(unknown[0])
        params = self._named(params)
        return {**(self._asked(messages, params) if messages else {}), **params, **self._ending()}

    def read(self, event: JsonMapping, now: float, answer: TimedAnswer) -> None:
        """Note what an event, or a whole answer, says: pieces, the reason to finish, token counts, the end."""
        if event.get("usage"):
            answer.usage = read_usage(event["usage"])
        for choice in event.get("choices") or ():
            self._read_choice(choice, now, answer)

    def _asked(self, messages: Sequence[JsonObject], params: JsonObject) -> JsonObject:
        """Return the fields that hold the messages; may take some out of `params`."""
        return {"messages": messages}

    def _named(self, params: JsonObject) -> JsonObject:
        return {self.renamed.get(name, name): value for name, value in params.items()}

    def _ending(self) -> JsonObject:
        return {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {"stream": False}

    def _read_choice(self, choice: JsonMapping, now: float, answer: TimedAnswer) -> None:
        delta = choice.get("delta") or choice.get("message") or {}
        text = delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if text or thought or delta.get("tool_calls"):
            answer.piece(now, text if isinstance(text, str) else json.dumps(text))
        if choice.get("finish_reason"):
            answer.finish_reason = choice["finish_reason"]

    def _refused(self, what: str) -> NoRequestError:
        return NoRequestError(f"{what}, for which --target {self.name} has no form")


class CompletionsApi(BenchApi):
    """Completions of a text: one message of a user without pictures."""

    name = "completions"
    path = "/completions"
    renamed: ClassVar[Mapping[str, str]] = {"max_completion_tokens": "max_tokens"}
    absent = frozenset({"tools", "tool_choice"})

    def _asked(self, messages: Sequence[JsonObject], params: JsonObject) -> JsonObject:
        if len(messages) > 1:
            raise self._refused(f"a conversation of {len(messages)} messages")
        parts = [part for message in messages for part in self._parts(message)]
        return {"prompt": "\n".join(parts)}

    def _named(self, params: JsonObject) -> JsonObject:
        named = super()._named(params)
        # In chat a switch with a number beside it, here the number.
        if isinstance(named.get("logprobs"), bool):
            number = named.pop("top_logprobs", 1)
            named["logprobs"] = number if named["logprobs"] else None
        return named

    def _parts(self, message: JsonObject) -> Iterable[str]:
        for part in _parts(message):
            if part["type"] != "text":
                raise self._refused("a picture" if part["type"] == "image_url" else f"a part {part['type']!r}")
            yield part["text"]

    def _read_choice(self, choice: JsonMapping, now: float, answer: TimedAnswer) -> None:
        if choice.get("text"):
            answer.piece(now, str(choice["text"]))
        if choice.get("finish_reason"):
            answer.finish_reason = choice["finish_reason"]


class ResponsesApi(BenchApi):
    """OpenAI's Responses API. Answers are not stored, unless a line or a parameter says `store`."""

    name = "responses"
    path = "/responses"
    input_field = "input"
    renamed: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens",
    }  # fmt: skip

    def _asked(self, messages: Sequence[JsonObject], params: JsonObject) -> JsonObject:
        return {"input": [self._item(message) for message in messages]}

    def _item(self, message: JsonObject) -> JsonObject:
        _without_calls(self, message)
        said = "output_text" if message["role"] == "assistant" else "input_text"
        parts: list[JsonObject] = []
        for part in _parts(message):
            if part["type"] == "text":
                parts.append({"type": said, "text": part["text"]})
            elif part["type"] == "image_url":
                source = part["image_url"]
                more = {"detail": source["detail"]} if source.get("detail") else {}
                parts.append({"type": "input_image", "image_url": source["url"], **more})
            else:
                raise self._refused(f"a part {part['type']!r}")
        return {"type": "message", "role": message["role"], "content": parts}

    def _named(self, params: JsonObject) -> JsonObject:
        named = {"store": False, **super()._named(params)}
        if (schema := _taken_schema(named)) is not None:
            named["text"] = {"format": schema}
        if (effort := named.pop("reasoning_effort", None)) is not None:
            named["reasoning"] = {"effort": effort}
        if named.get("tools"):
            named["tools"] = [{"type": "function", **_function(tool)} for tool in named["tools"]]
        if isinstance(choice := named.get("tool_choice"), dict):
            named["tool_choice"] = {"type": "function", "name": _function(choice).get("name")}
        return named

    def _ending(self) -> JsonObject:
        return {"stream": self.stream}

    def read(self, event: JsonMapping, now: float, answer: TimedAnswer) -> None:
        kind = str(event.get("type") or "")
        if kind.endswith(".delta"):
            if event.get("delta"):
                answer.piece(now, str(event["delta"]) if kind == "response.output_text.delta" else "")
            return
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self._finish(event["response"], now, answer)
        elif event.get("object") == "response":
            for item in event.get("output") or ():
                answer.piece(now, "".join(str(part.get("text") or "") for part in item.get("content") or ()))
            self._finish(event, now, answer)

    def _finish(self, response: JsonMapping, now: float, answer: TimedAnswer) -> None:
        if response.get("usage"):
            answer.usage = read_usage(_chat_usage(response["usage"]))
        why = response.get("incomplete_details") or {}
        answer.finish_reason = "length" if why.get("reason") == "max_output_tokens" else why.get("reason") or "stop"
        answer.done, answer.end = True, now


class MessagesApi(BenchApi):
    """Anthropic's Messages API, with at most 1,024 tokens an answer unless a line or a parameter says more."""

    name = "messages"
    path = "/messages"
    counts_pictures = False
    renamed: ClassVar[Mapping[str, str]] = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}

    def headers(self, key: str | None) -> dict[str, str]:
        own = {"x-api-key": key} if key else {}
        return {"anthropic-version": "2023-06-01", **own, **super().headers(key)}

    def _asked(self, messages: Sequence[JsonObject], params: JsonObject) -> JsonObject:
        turns, system = [], []
        for message in messages:
            _without_calls(self, message)
            blocks = [self._block(part) for part in _parts(message)]
            if message["role"] in ("system", "developer"):
                system += blocks
            else:
                turns.append({"role": message["role"], "content": blocks})
        return {**({"system": system} if system else {}), "messages": turns}

    def _block(self, part: JsonObject) -> JsonObject:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] != "image_url":
            raise self._refused(f"a part {part['type']!r}")
        url = part["image_url"]["url"]
        head, comma, data = url.partition(",")
        if not (comma and head.startswith("data:")):
            return {"type": "image", "source": {"type": "url", "url": url}}
        kind = head[5:].partition(";")[0]
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}

    def _named(self, params: JsonObject) -> JsonObject:
        named = {"max_tokens": MESSAGES_MAX_TOKENS, **super()._named(params)}
        if isinstance(named.get("stop_sequences"), str):
            named["stop_sequences"] = [named["stop_sequences"]]
        if (schema := _taken_schema(named)) is not None:
            if schema.get("type") != "json_schema":
                raise self._refused(f"response_format {schema.get('type')!r}")
            named["output_config"] = {"format": {"type": "json_schema", "schema": schema.get("schema")}}
        if named.get("tools"):
            named["tools"] = [
                {
                    "name": function.get("name"),
                    "description": function.get("description") or "",
                    "input_schema": function.get("parameters") or {"type": "object"},
                }
                for function in map(_function, named["tools"])
            ]
        if (choice := named.get("tool_choice")) is not None:
            words = {"auto": "auto", "required": "any", "none": "none"}
            named["tool_choice"] = (
                {"type": words.get(choice, choice)}
                if isinstance(choice, str)
                else {"type": "tool", "name": _function(choice).get("name")}
            )
        return named

    def _ending(self) -> JsonObject:
        return {"stream": self.stream}

    def read(self, event: JsonMapping, now: float, answer: TimedAnswer) -> None:
        kind = event.get("type")
        if kind == "content_block_delta":
            delta = event["delta"]
            text = delta.get("text") or ""
            if text or delta.get("thinking") or delta.get("partial_json"):
                answer.piece(now, text)
        elif kind == "message_start":
            self._count(event["message"].get("usage"), answer)
        elif kind == "message_delta":
            self._count(event.get("usage"), answer)
            answer.finish_reason = event["delta"].get("stop_reason") or answer.finish_reason
        elif kind == "message_stop":
            answer.done, answer.end = True, now
        elif kind == "message":
            for block in event.get("content") or ():
                answer.piece(now, str(block.get("text") or ""))
            self._count(event.get("usage"), answer)
            answer.finish_reason = event.get("stop_reason")
            answer.done, answer.end = True, now

    def _count(self, usage: JsonMapping | None, answer: TimedAnswer) -> None:
        """Take the counts of an event; a later one repeats or completes those of an earlier one."""
        if not usage:
            return
        cached = usage.get("cache_read_input_tokens") or 0
        prompt = (usage.get("input_tokens") or 0) + cached + (usage.get("cache_creation_input_tokens") or 0)
        known = answer.usage
        answer.usage = read_usage(
            {
                "prompt_tokens": max(prompt, known.prompt_tokens if known else 0),
                "completion_tokens": max(usage.get("output_tokens") or 0, known.completion_tokens if known else 0),
                "prompt_tokens_details": {"cached_tokens": max(cached, known.cached_tokens if known else 0)},
            }
        )


class DecisionsApi(ResponsesApi):
    """OpenAI's decisions: how probable each answer to `questions` is. Answers come whole, without a first token.

    Without `questions`, the text of a line is a yes-or-no question about its pictures.
    """

    name = "decisions"
    path = "/decisions"
    streams = False
    counts_pictures = False
    fields = frozenset({"questions"})
    renamed: ClassVar[Mapping[str, str]] = {}
    absent: ClassVar[frozenset[str]] = CHAT_FIELDS

    def _asked(self, messages: Sequence[JsonObject], params: JsonObject) -> JsonObject:
        items = [self._item(message) for message in messages]
        if "questions" in params:
            return {"input": items}
        content = items[-1]["content"]
        texts = [part["text"] for part in content if part["type"] == "input_text"]
        items[-1]["content"] = [part for part in content if part["type"] != "input_text"]
        if not texts or not items[-1]["content"]:
            raise NoRequestError("--target decisions needs `questions`, or a picture with a yes-or-no question")
        return {"input": items, "questions": [_question("\n".join(texts))]}

    def _named(self, params: JsonObject) -> JsonObject:
        if (asked := params.get("questions")) is not None:
            params["questions"] = [_question(question) for question in (asked if isinstance(asked, list) else [asked])]
        return params

    def _ending(self) -> JsonObject:
        return {}

    def read(self, event: JsonMapping, now: float, answer: TimedAnswer) -> None:
        if answers := event.get("answers"):
            answer.piece(now, json.dumps(answers, ensure_ascii=False))
        if event.get("usage"):
            answer.usage = read_usage(_chat_usage(event["usage"]))
        answer.finish_reason, answer.done, answer.end = "stop", True, now


APIS: Final = {api.name: api for api in (BenchApi, ResponsesApi, CompletionsApi, MessagesApi, DecisionsApi)}


def find_api(name: str) -> type[BenchApi]:
    """Return the API of this name.

    Raises:
        ConfigError: no API has this name.
    """
    if name not in APIS:
        raise ConfigError(f"unknown --target {name!r}", hint=nearest(name, APIS))
    return APIS[name]


def _parts(message: JsonObject) -> list[JsonObject]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _without_calls(api: BenchApi, message: JsonObject) -> None:
    if message["role"] == "tool" or message.get("tool_calls"):
        raise NoRequestError(f"a turn of a tool, which is not rewritten for --target {api.name}")


def _function(tool: JsonObject) -> JsonObject:
    """Return the function of a tool, or of a choice of one."""
    function = tool.get("function")
    return function if isinstance(function, dict) else {key: tool[key] for key in tool if key != "type"}


def _taken_schema(named: JsonObject) -> JsonObject | None:
    """Take chat's `response_format` out of `named` and return it with its schema's fields beside its type."""
    wanted = named.pop("response_format", None)
    if not isinstance(wanted, dict):
        return None
    return {"type": wanted.get("type"), **(wanted.get("json_schema") or {})}


def _chat_usage(usage: JsonMapping) -> WireUsage:
    return {
        "prompt_tokens": usage.get("input_tokens"),
        "completion_tokens": usage.get("output_tokens"),
        "prompt_tokens_details": usage.get("input_tokens_details"),
        "completion_tokens_details": usage.get("output_tokens_details"),
    }


def _question(question: object) -> object:
    return {"type": "predicate", "instructions": question} if isinstance(question, str) else question
