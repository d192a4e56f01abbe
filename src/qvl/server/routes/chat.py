"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from qvl.errors import RequestError
from qvl.ids import new_id
from qvl.server.errors import from_validation
from qvl.server.openai_format import (
    RunningUsage,
    dumps,
    finish_word,
    message_of,
    read_logprobs,
    tool_delta,
    usage_of,
    wants_running_usage,
)
from qvl.server.schemas import ChatCompletionRequest, StreamOptions, StructuredOutputs
from qvl.server.serving import answer, chat_request, picture_places, started_stream
from qvl.types import Chunk, Result

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

DONE: Final = b"data: [DONE]\n\n"


async def chat_completions(exchange: Exchange) -> None:
    """Answers one chat request, at once or as events."""
    body = await exchange.body()
    try:
        wanted = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as exc:
        raise from_validation(exc, body) from exc
    del body
    exchange.picture_places = lambda: picture_places("messages", wanted.messages, "content")
    await exchange.until_done(lambda: _stream(exchange, wanted) if wanted.stream else _whole(exchange, wanted))


async def _whole(exchange: Exchange, wanted: ChatCompletionRequest) -> None:
    asked = await _read(exchange, wanted)
    result = await answer(exchange, asked)
    await exchange.respond_json(_completion(result, asked), asked.headers(result))


async def _read(exchange: Exchange, wanted: ChatCompletionRequest) -> ServedRequest:
    params = wanted.sampling()
    limit = wanted.max_completion_tokens or wanted.max_tokens
    if limit is not None:
        params["max_tokens"] = limit
    if wanted.top_logprobs and not wanted.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if wanted.stream_options is not None and not wanted.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if wanted.logprobs:
        params["logprobs"] = wanted.top_logprobs or 0
    if wanted.tools:
        params["tools"] = wanted.tools
    if wanted.tool_choice is not None:
        choice = wanted.tool_choice
        params["tool_choice"] = choice if isinstance(choice, str) else choice["function"]["name"]
    if wanted.parallel_tool_calls is not None:
        params["parallel_tool_calls"] = wanted.parallel_tool_calls
    if wanted.response_format is not None:
        params["response_format"] = wanted.response_format
    if wanted.structured_outputs:
        if wanted.response_format is not None or len(wanted.structured_outputs) != 1:
            raise RequestError(
                "structured_outputs is given beside response_format, or is not one of json, json_object, regex, choice",
                param="structured_outputs",
                code="invalid_value",
            )
        params["response_format"] = _form(wanted.structured_outputs)
    return await chat_request(exchange, wanted.model, wanted.messages, params, wanted.model_extra)


def _form(wanted: StructuredOutputs) -> dict[str, Any]:
    if "json" in wanted:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted["json"]}}
    if "regex" in wanted:
        return {"type": "regex", "pattern": wanted["regex"]}
    return {"type": "choice", "choices": wanted["choice"]} if "choice" in wanted else {"type": "json_object"}


def _completion(result: Result, asked: ServedRequest) -> dict[str, Any]:
    """A `chat.completion` object."""
    return {
        "id": f"chatcmpl-{new_id()}",
        "object": "chat.completion",
        "created": int(result.created_at or time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": choice.index,
                "message": message_of(choice),
                "logprobs": None if choice.logprobs is None else read_logprobs(choice.logprobs),
                "finish_reason": finish_word(choice.finish_reason),
            }
            for choice in result.choices
        ],
        "usage": usage_of(result.usage),
        "service_tier": "default",
        "system_fingerprint": asked.fingerprint,
    }


class ChunkWriter:
    """Writes `chat.completion.chunk` events."""

    def __init__(self, asked: ServedRequest, options: StreamOptions | None) -> None:
        self._include_usage = bool(options and options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{new_id()}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": asked.fingerprint,
        }
        self._tail: dict[str, Any] = {"usage": None} if self._include_usage else {}
        self._running = RunningUsage() if wants_running_usage(options) else None
        self._begun: set[int] = set()

    def write(self, chunk: Chunk) -> bytes:
        """The events of one piece: the role first for each choice, the finish_reason in an event of its own."""
        found: list[bytes] = []
        if self._running is not None:
            self._tail = {"usage": self._running.after(chunk)}
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            found.append(self._event(chunk.index, {"role": "assistant", "content": "", "refusal": None}))
        if chunk.text or chunk.logprobs or chunk.tool_calls or chunk.reasoning:
            logprobs = read_logprobs(chunk.logprobs) if chunk.logprobs else None
            found.append(self._event(chunk.index, _delta(chunk), logprobs=logprobs))
        if chunk.finish_reason is not None:
            found.append(self._event(chunk.index, {}, finish=finish_word(chunk.finish_reason)))
        return b"".join(found)

    def _event(
        self, index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return b"data: " + dumps({**self._head, "choices": [choice], **self._tail}) + b"\n\n"

    def close(self, result: Result) -> bytes:
        """The usage event, where it was asked for, and `[DONE]`."""
        if not self._include_usage:
            return DONE
        return b"data: " + dumps({**self._head, "choices": [], "usage": usage_of(result.usage)}) + b"\n\n" + DONE


def _delta(chunk: Chunk) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [tool_delta(call) for call in chunk.tool_calls]
    return delta


async def _stream(exchange: Exchange, wanted: ChatCompletionRequest) -> None:
    asked = await _read(exchange, wanted)
    writer = ChunkWriter(asked, wanted.stream_options)
    streaming = await started_stream(exchange, asked)
    async with aclosing(streaming.items) as items:
        async for item in items:
            # The headers wait for the first piece, so that what fails before it has its true status.
            if not exchange.streaming:
                await exchange.start_events(asked.stream_headers(streaming))
            if isinstance(item, Chunk):
                if piece := writer.write(item):
                    await exchange.write(piece)
            else:
                asked.finished(item)
                await exchange.end(writer.close(item))
