"""`POST /v1/responses`: text, pictures and function calls in, output items out. Nothing is kept between requests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qvl.errors import QvlError, RequestError
from qvl.ids import new_id
from qvl.server.errors import from_validation
from qvl.server.openai_format import dumps, read_logprobs
from qvl.server.responses_input import messages_of
from qvl.server.schemas import ResponsesRequest
from qvl.server.serving import answer, chat_request, picture_places, started_stream
from qvl.types import Choice, Chunk, Result, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest


async def responses(exchange: Exchange) -> None:
    """Answers one request of the Responses API, at once or as events."""
    body = await exchange.body()
    try:
        wanted = ResponsesRequest.model_validate_json(body)
    except ValidationError as exc:
        raise from_validation(exc, body) from exc
    if not isinstance(wanted.input, str):
        items = wanted.input
        exchange.picture_places = lambda: picture_places("input", items, "content", "output")
    asked = await exchange.until_done(lambda: _read(exchange, wanted))
    if wanted.stream:
        exchange.error_event = _error_event
        await exchange.until_done(lambda: _stream(exchange, wanted, asked))
        return
    result = await exchange.until_done(lambda: answer(exchange, asked))
    head = _head(wanted, asked)
    output = [] if not result.choices else _output(result.choices[0], wanted)
    await exchange.respond_json(_finished(head, output, result), asked.headers(result))


async def _read(exchange: Exchange, wanted: ResponsesRequest) -> ServedRequest:
    params: dict[str, Any] = {}
    for name in ("temperature", "top_p", "max_pixels", "min_pixels", "cache_salt", "parallel_tool_calls"):
        value = getattr(wanted, name)
        if value is not None:
            params[name] = value
    if wanted.max_output_tokens is not None:
        params["max_tokens"] = wanted.max_output_tokens
    if wanted.include:
        params["logprobs"] = wanted.top_logprobs or 0
    elif wanted.top_logprobs:
        raise RequestError(
            "top_logprobs needs include: ['message.output_text.logprobs']", param="top_logprobs", code="invalid_value"
        )
    if wanted.tools:
        params["tools"] = [{"type": "function", "function": {**tool}} for tool in _tools(wanted)]
    if wanted.tool_choice is not None:
        choice = wanted.tool_choice
        params["tool_choice"] = choice if isinstance(choice, str) else choice["name"]
    if wanted.text is not None and wanted.text.format is not None:
        form: Mapping[str, Any] = wanted.text.format
        if form["type"] == "json_schema":
            form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        params["response_format"] = form
    return await chat_request(exchange, wanted.model, _messages(wanted), params, wanted.model_extra)


def _tools(wanted: ResponsesRequest) -> list[dict[str, Any]]:
    """The tools by what says something of them."""
    return [
        {name: value for name, value in tool.items() if name not in ("type", "cache_control")}
        for tool in wanted.tools or ()
    ]


def _messages(wanted: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as chat messages."""
    found = [{"role": "system", "content": wanted.instructions}] if wanted.instructions else []
    if isinstance(wanted.input, str):
        return [*found, {"role": "user", "content": wanted.input}]
    found += messages_of(wanted.input)
    if not found:
        raise RequestError("input is empty", param="input", code="invalid_value")
    return found


def _head(wanted: ResponsesRequest, asked: ServedRequest) -> dict[str, Any]:
    """What every form of the response object repeats of the request."""
    sampling = asked.request.sampling
    form: Any = (wanted.text.format if wanted.text is not None else None) or {"type": "text"}
    tools = [
        {"type": "function", "description": None, "parameters": {}, "strict": False, **tool} for tool in _tools(wanted)
    ]
    return {
        "id": f"resp_{new_id()}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "metadata": wanted.metadata or {},
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": asked.request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": form},
        "tool_choice": wanted.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": wanted.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": wanted.user,
    }


def _finished(head: dict[str, Any], output: list[dict[str, Any]], result: Result) -> dict[str, Any]:
    cut = result.finish_reason in ("length", "abort")
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": _usage(result.usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _output(choice: Choice, wanted: ResponsesRequest) -> list[dict[str, Any]]:
    """The output items of a finished answer: the reasoning is left out, as OpenAI leaves it out."""
    items: list[dict[str, Any]] = []
    status = "incomplete" if choice.finish_reason in ("length", "abort") else "completed"
    if choice.text or not choice.tool_calls:
        items.append(_message_item(_item_id("msg"), choice.text, choice.logprobs, status))
    items += [_call_item(_item_id("fc"), call.id, call.name, call.arguments, status) for call in choice.tool_calls]
    return items


def _item_id(prefix: str) -> str:
    return f"{prefix}_{new_id()}"


def _text_part(text: str, logprobs: tuple[TokenLogprob, ...] | None) -> dict[str, Any]:
    told = [] if logprobs is None else read_logprobs(logprobs)["content"]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": told}


def _message_item(ident: str, text: str, logprobs: tuple[TokenLogprob, ...] | None, status: str) -> dict[str, Any]:
    content = [] if status == "in_progress" else [_text_part(text, logprobs)]
    return {"id": ident, "type": "message", "role": "assistant", "status": status, "content": content}


def _call_item(ident: str, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": ident,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


class EventWriter:
    """Writes the events of a streamed response, numbered, each item opened before its pieces and closed after."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = head
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._items: list[dict[str, Any]] = []
        self._message: dict[str, Any] | None = None
        self._calls: dict[int, dict[str, Any]] = {}

    def event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps(value))

    def open(self) -> bytes:
        return self.event("response.created", response=self._head) + self.event(
            "response.in_progress", response=self._head
        )

    def piece(self, chunk: Chunk) -> bytes:
        """The events of one piece."""
        found = b""
        if chunk.text or chunk.logprobs:
            found += self._delta(chunk)
        for delta in chunk.tool_calls:
            found += self._call(delta)
        return found

    def _delta(self, chunk: Chunk) -> bytes:
        found = b""
        if self._message is None:
            self._message = _message_item(_item_id("msg"), "", None, "in_progress")
            index = self._add(self._message)
            found = self.event("response.output_item.added", output_index=index, item=self._message)
            found += self.event("response.content_part.added", **self._place(), part=_text_part("", None))
        self._text.append(chunk.text)
        self._logprobs += chunk.logprobs
        told = _bare(read_logprobs(chunk.logprobs)["content"])
        return found + self.event("response.output_text.delta", **self._place(), delta=chunk.text, logprobs=told)

    def _call(self, delta: ToolCallDelta) -> bytes:
        found = b""
        call = self._calls.get(delta.index)
        if call is None:
            call = _call_item(_item_id("fc"), delta.id or "", delta.name or "", "", "in_progress")
            self._calls[delta.index] = call
            index = self._add(call)
            found = self.event("response.output_item.added", output_index=index, item=dict(call))
        if not delta.arguments:
            return found
        call["arguments"] += delta.arguments
        return found + self.event(
            "response.function_call_arguments.delta",
            output_index=self._items.index(call),
            item_id=call["id"],
            delta=delta.arguments,
        )

    def _add(self, item: dict[str, Any]) -> int:
        self._items.append(item)
        return len(self._items) - 1

    def _place(self) -> dict[str, Any]:
        assert self._message is not None
        return {
            "output_index": self._items.index(self._message),
            "item_id": self._message["id"],
            "content_index": 0,
        }

    def close(self, result: Result) -> bytes:
        """The closing events of every item, and of the whole."""
        found = b""
        if not self._items:
            found += self._delta(Chunk())
        status = "incomplete" if result.finish_reason in ("length", "abort") else "completed"
        output = [self._closed(item, result, status) for item in self._items]
        for index, item in enumerate(output):
            found += b"".join(self._closing(index, item))
        whole = _finished(self._head, output, result)
        return found + self.event(f"response.{whole['status']}", response=whole)

    def _closed(self, item: dict[str, Any], result: Result, status: str) -> dict[str, Any]:
        if item["type"] == "function_call":
            return {**item, "status": status}
        return _message_item(item["id"], "".join(self._text), tuple(self._logprobs) or None, status)

    def _closing(self, index: int, item: dict[str, Any]) -> Iterator[bytes]:
        if item["type"] == "function_call":
            yield self.event(
                "response.function_call_arguments.done",
                output_index=index,
                item_id=item["id"],
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            told = _bare(part["logprobs"])
            yield self.event("response.output_text.done", **self._place(), text=part["text"], logprobs=told)
            yield self.event("response.content_part.done", **self._place(), part=part)
        yield self.event("response.output_item.done", output_index=index, item=item)


def _bare(logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logprobs as events have them: without the bytes, which stand in the finished item."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in one["top_logprobs"]],
        }
        for one in logprobs
    ]


def _error_event(error: QvlError) -> bytes:
    value = {"type": "error", "code": error.code, "message": str(error), "param": error.param, "sequence_number": 0}
    return b"event: error\ndata: " + dumps(value) + b"\n\n"


async def _stream(exchange: Exchange, wanted: ResponsesRequest, asked: ServedRequest) -> None:
    writer = EventWriter(_head(wanted, asked))
    streaming = await started_stream(exchange, asked)
    async with aclosing(streaming.items) as items:
        async for item in items:
            if not exchange.streaming:
                await exchange.start_events(asked.stream_headers(streaming))
                await exchange.write(writer.open())
            if isinstance(item, Chunk):
                if piece := writer.piece(item):
                    await exchange.write(piece)
            else:
                asked.finished(item)
                await exchange.end(writer.close(item))
