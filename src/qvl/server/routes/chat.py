"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvl.errors import RequestError
from qvl.pipeline.parse_parts import picture_texts
from qvl.server.answers import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    FinishWord,
    MessageDelta,
    data_event,
)
from qvl.server.format_schemas import asked_format, name_of_format
from qvl.server.openai_format import (
    StreamUsage,
    answer_head,
    finish_word,
    message_of,
    notes_of,
    prompt_scores,
    read_logprobs,
    tool_delta,
    usage_of,
)
from qvl.server.schemas import ChatCompletionRequest
from qvl.server.serving import draft_of, draft_once, name_request, picture_params, read_request, served_request, stream
from qvl.server.tool_choice import choose_tools
from qvl.types import Choice, Chunk, Result

if TYPE_CHECKING:
    from qvl.pipeline.parse_request import Draft, RequestParams
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest


async def chat_completions(exchange: Exchange) -> None:
    """Answer one chat request, as JSON or as server-sent events."""
    body = await read_request(exchange, ChatCompletionRequest, lambda body: picture_texts(body.messages, "content"))
    name_request(exchange, body)
    exchange.field_names = _names(body)
    exchange.picture_params = lambda: picture_params("messages", body.messages, "content")
    await exchange.until_done(lambda: _answer(exchange, body))


async def _answer(exchange: Exchange, body: ChatCompletionRequest) -> None:
    served = await _read(exchange, body)
    if body.stream:
        await stream(served, ChunkWriter(served, body))
    else:
        result = await served.answer()
        await exchange.respond_json(_completion(result, served, body), served.headers(result))


def _names(body: ChatCompletionRequest) -> dict[str, str]:
    """Return which of two names for the same the client used."""
    names = {"max_completion_tokens": "max_tokens"}
    if body.max_completion_tokens is not None:
        names = {"max_tokens": "max_completion_tokens"}
    return names | name_of_format(body.response_format, body.structured_outputs)


async def _read(exchange: Exchange, body: ChatCompletionRequest) -> ServedRequest:
    draft = draft_once(exchange, body.model, lambda: _draft(exchange, body))
    return await served_request(exchange, body.model, draft)


def _draft(exchange: Exchange, body: ChatCompletionRequest) -> Draft:
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
    elif body.logprob_token_ids:
        raise RequestError("logprob_token_ids needs logprobs: true", param="logprob_token_ids", code="invalid_value")
    params.update(_of_prompt(body))
    if body.tools:
        params["tools"] = body.tools
    if body.tool_choice is not None:
        params.update(choose_tools(body.tools or (), body.tool_choice))
    if body.parallel_tool_calls is not None:
        params["parallel_tool_calls"] = body.parallel_tool_calls
    form = asked_format(body.response_format, body.structured_outputs, "response_format")
    if form is not None:
        params["response_format"] = form
    return draft_of(exchange, body.model, body.messages, params, body.model_extra)


def _of_prompt(body: ChatCompletionRequest) -> RequestParams:
    """Return the parameters that shape the prompt beside the messages."""
    params: RequestParams = {}
    if body.chat_template_kwargs is not None:
        params["chat_template_kwargs"] = body.chat_template_kwargs
    if body.reasoning_effort is not None:
        params["reasoning_effort"] = body.reasoning_effort
    if body.add_generation_prompt is not None:
        params["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message is not None:
        params["continue_final_message"] = body.continue_final_message
    if body.echo and body.messages[-1].get("role") != "assistant":
        raise RequestError(
            "echo: the last message is not an assistant's, so there is nothing that the answer could begin with",
            hint="leave it out",
            param="echo",
            code="invalid_value",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            hint="set add_generation_prompt to false",
            param="add_generation_prompt",
            code="invalid_value",
        )
    return params


def _echoed(served: ServedRequest, body: ChatCompletionRequest) -> str:
    """Return the text that the answer begins with."""
    return served.request.messages[-1].text if body.echo else ""


def _completion(result: Result, served: ServedRequest, body: ChatCompletionRequest) -> ChatCompletion:
    echo = _echoed(served, body)
    whole: ChatCompletion = {
        **answer_head("chatcmpl", served.model, served.fingerprint, result.created_at, body.request_id or ""),
        "object": "chat.completion",
        "choices": [_choice(choice, body, echo) for choice in result.choices],
        "usage": usage_of(result.usage),
        "service_tier": "default",
        **notes_of(result),
    }
    if result.prompt is not None:
        if body.return_token_ids:
            whole["prompt_token_ids"] = list(result.prompt.token_ids)
        if body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_scores(result.prompt)
    return whole


def _choice(choice: Choice, body: ChatCompletionRequest, echo: str) -> ChatChoice:
    written: ChatChoice = {
        "index": choice.index,
        "message": message_of(choice, echo, reasoning=body.include_reasoning is not False),
        "logprobs": None if choice.logprobs is None else read_logprobs(choice.logprobs),
        "finish_reason": finish_word(choice.finish_reason),
    }
    if body.return_token_ids:
        written["token_ids"] = list(choice.token_ids)
    if choice.stop_string is not None:
        written["stop_reason"] = choice.stop_string
    return written


class ChunkWriter:
    """Writes `chat.completion.chunk` events."""

    def __init__(self, served: ServedRequest, body: ChatCompletionRequest) -> None:
        self._usage = StreamUsage(body.stream_options)
        self._head: ChatCompletionChunk = {
            **answer_head("chatcmpl", served.model, served.fingerprint, ident=body.request_id or ""),
            "object": "chat.completion.chunk",
            "choices": [],
        }
        self._echo = _echoed(served, body)
        self._reasoning = body.include_reasoning is not False
        self._ids = bool(body.return_token_ids)
        self._scores = body.prompt_logprobs is not None
        self._begun: set[int] = set()

    def write(self, chunk: Chunk) -> bytes:
        """Return the events of one chunk: each choice starts with its role; finish_reason has an event of its own."""
        events = b""
        usage = self._usage.after(chunk)
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            opening: MessageDelta = {"role": "assistant", "content": "", "refusal": None}
            events = self._event(chunk.index, opening, {**usage, **self._of_prompt(chunk)})
            if self._echo:
                events += self._event(chunk.index, {"content": self._echo}, usage)
        if chunk.reasoning and not self._reasoning:
            chunk = replace(chunk, reasoning="")
        if chunk.text or chunk.logprobs or chunk.tool_calls or chunk.reasoning:
            logprobs = read_logprobs(chunk.logprobs) if chunk.logprobs else None
            ids = chunk.token_ids
            events += self._event(chunk.index, _delta(chunk), usage, logprobs=logprobs, token_ids=ids)
            chunk = replace(chunk, token_ids=()) if ids else chunk
        if chunk.finish_reason is not None:
            finish = finish_word(chunk.finish_reason)
            events += self._event(
                chunk.index, {}, usage, finish_reason=finish, token_ids=chunk.token_ids, stop=chunk.stop_string
            )
        return events

    def _of_prompt(self, chunk: Chunk) -> dict[str, object]:
        """Return what the first event tells of the prompt, where that was asked for."""
        told: dict[str, object] = {}
        if chunk.prompt is not None and self._ids:
            told["prompt_token_ids"] = list(chunk.prompt.token_ids)
        if chunk.prompt is not None and self._scores:
            told["prompt_logprobs"] = prompt_scores(chunk.prompt)
        return told

    def _event(
        self,
        index: int,
        delta: MessageDelta,
        usage: Mapping[str, object],
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishWord | None = None,
        token_ids: Sequence[int] = (),
        stop: str | None = None,
    ) -> bytes:
        choice: ChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if stop is not None:
            choice["stop_reason"] = stop
        if token_ids and self._ids:
            choice["token_ids"] = list(token_ids)
        return data_event({**self._head, "choices": [choice], **usage})

    def close(self, result: Result) -> bytes:
        """Return the event with usage and notes, if there is any need of one, and `[DONE]`."""
        empty: ChunkChoice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
        return self._usage.close(self._head, result, empty)


def _delta(chunk: Chunk) -> MessageDelta:
    delta: MessageDelta = {}
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.reasoning:
        delta["reasoning_content"] = delta["reasoning"] = chunk.reasoning
    if chunk.tool_calls:
        delta["tool_calls"] = [tool_delta(call) for call in chunk.tool_calls]
    return delta
