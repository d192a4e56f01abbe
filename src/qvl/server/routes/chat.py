"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.errors import RequestError
from qvl.server.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    FinishWord,
    MessageDelta,
    TokenUsage,
    data_event,
)
from qvl.server.openai_format import (
    StreamUsage,
    answer_head,
    finish_word,
    message_of,
    read_logprobs,
    tool_delta,
    usage_of,
)
from qvl.server.schemas import ChatCompletionRequest, StreamOptions, StructuredOutputs
from qvl.server.serving import chat_request, picture_params, stream, validated
from qvl.types import Chunk, JsonObject, Result

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest


async def chat_completions(exchange: Exchange) -> None:
    """Answer one chat request, as JSON or as server-sent events."""
    body = validated(ChatCompletionRequest, await exchange.body())
    exchange.picture_params = lambda: picture_params("messages", body.messages, "content")
    await exchange.until_done(lambda: _answer(exchange, body))


async def _answer(exchange: Exchange, body: ChatCompletionRequest) -> None:
    served = await _read(exchange, body)
    if body.stream:
        await stream(served, ChunkWriter(served, body.stream_options))
    else:
        result = await served.answer()
        await exchange.respond_json(_completion(result, served), served.headers(result))


async def _read(exchange: Exchange, body: ChatCompletionRequest) -> ServedRequest:
    params = body.sampling()
    limit = body.max_completion_tokens or body.max_tokens
    if limit is not None:
        params["max_tokens"] = limit
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    if body.tools:
        params["tools"] = body.tools
    if body.tool_choice is not None:
        choice = body.tool_choice
        params["tool_choice"] = choice if isinstance(choice, str) else choice["function"]["name"]
    if body.parallel_tool_calls is not None:
        params["parallel_tool_calls"] = body.parallel_tool_calls
    if body.response_format is not None:
        params["response_format"] = body.response_format
    if body.structured_outputs:
        if body.response_format is not None or len(body.structured_outputs) != 1:
            raise RequestError(
                "structured_outputs must be one of json, json_object, regex, choice, without response_format",
                param="structured_outputs",
                code="invalid_value",
            )
        params["response_format"] = _response_format(body.structured_outputs)
    return await chat_request(exchange, body.model, body.messages, params, body.model_extra)


def _response_format(outputs: StructuredOutputs) -> JsonObject:
    if "json" in outputs:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": outputs["json"]}}
    if "regex" in outputs:
        return {"type": "regex", "pattern": outputs["regex"]}
    return {"type": "choice", "choices": outputs["choice"]} if "choice" in outputs else {"type": "json_object"}


def _completion(result: Result, served: ServedRequest) -> ChatCompletion:
    return {
        **answer_head("chatcmpl", served.model, served.fingerprint, result.created_at),
        "object": "chat.completion",
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
    }


class ChunkWriter:
    """Writes `chat.completion.chunk` events."""

    def __init__(self, served: ServedRequest, options: StreamOptions | None) -> None:
        self._usage = StreamUsage(options)
        self._head: ChatCompletionChunk = {
            **answer_head("chatcmpl", served.model, served.fingerprint),
            "object": "chat.completion.chunk",
            "choices": [],
        }
        self._begun: set[int] = set()

    def write(self, chunk: Chunk) -> bytes:
        """Return the events of one chunk: each choice starts with its role; finish_reason has an event of its own."""
        events = b""
        usage = self._usage.after(chunk)
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            events = self._event(chunk.index, {"role": "assistant", "content": "", "refusal": None}, usage)
        if chunk.text or chunk.logprobs or chunk.tool_calls or chunk.reasoning:
            logprobs = read_logprobs(chunk.logprobs) if chunk.logprobs else None
            events += self._event(chunk.index, _delta(chunk), usage, logprobs=logprobs)
        if chunk.finish_reason is not None:
            events += self._event(chunk.index, {}, usage, finish_reason=finish_word(chunk.finish_reason))
        return events

    def _event(
        self,
        index: int,
        delta: MessageDelta,
        usage: dict[str, TokenUsage | None],
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishWord | None = None,
    ) -> bytes:
        choice: ChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return data_event({**self._head, "choices": [choice], **usage})

    def close(self, result: Result) -> bytes:
        """Return the usage event, if requested, and `[DONE]`."""
        return self._usage.close(self._head, result)


def _delta(chunk: Chunk) -> MessageDelta:
    delta: MessageDelta = {}
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [tool_delta(call) for call in chunk.tool_calls]
    return delta
