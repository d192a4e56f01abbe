"""`POST /v1/responses`: text, pictures and function calls in, output items out. Stateless."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from qvl.errors import QvlError, RequestError
from qvl.ids import new_id
from qvl.server.answers import (
    CallItem,
    ChosenToken,
    EventToken,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    Response,
    ResponseEvent,
    ResponseUsage,
    dumps,
)
from qvl.server.openai_format import read_logprobs
from qvl.server.responses_input import messages_of
from qvl.server.schemas import ResponsesRequest
from qvl.server.serving import chat_request, picture_params, stream, validated
from qvl.types import Choice, Chunk, FinishReason, JsonObject, Result, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest


async def responses(exchange: Exchange) -> None:
    """Answer one request of the Responses API, as JSON or as server-sent events."""
    body = validated(ResponsesRequest, await exchange.body())
    if not isinstance(body.input, str):
        items = body.input
        exchange.picture_params = lambda: picture_params("input", items, "content", "output")
    served = await exchange.until_done(lambda: _read(exchange, body))
    head = _head(body, served)
    if body.stream:
        exchange.error_event = _error_event
        await exchange.until_done(lambda: stream(served, EventWriter(head)))
        return
    result = await exchange.until_done(served.answer)
    output = _output(result.choices[0]) if result.choices else []
    await exchange.respond_json(_finished(head, output, result), served.headers(result))


async def _read(exchange: Exchange, body: ResponsesRequest) -> ServedRequest:
    params = body.sampling()
    if body.parallel_tool_calls is not None:
        params["parallel_tool_calls"] = body.parallel_tool_calls
    if body.max_output_tokens is not None:
        params["max_tokens"] = body.max_output_tokens
    if body.include:
        params["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RequestError(
            "top_logprobs needs include: ['message.output_text.logprobs']", param="top_logprobs", code="invalid_value"
        )
    if body.tools:
        params["tools"] = [{"type": "function", "function": tool} for tool in _tools(body)]
    if body.tool_choice is not None:
        choice = body.tool_choice
        params["tool_choice"] = choice if isinstance(choice, str) else choice["name"]
    if body.text is not None and body.text.format is not None:
        form: JsonObject = {**body.text.format}
        if form["type"] == "json_schema":
            form = {"type": form.pop("type"), "json_schema": form}
        params["response_format"] = form
    return await chat_request(exchange, body.model, _messages(body), params, body.model_extra)


def _tools(body: ResponsesRequest) -> list[JsonObject]:
    """Return the tools in the form of chat completions, without null and false fields."""
    return [
        {name: value for name, value in tool.items() if name not in ("type", "cache_control")}
        for tool in body.tools or ()
    ]


def _messages(body: ResponsesRequest) -> list[JsonObject]:
    """Return the input as chat messages."""
    messages: list[JsonObject] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    messages += messages_of(body.input)
    if not messages:
        raise RequestError("input is empty", param="input", code="invalid_value")
    return messages


def _head(body: ResponsesRequest, served: ServedRequest) -> Response:
    """Return the response in progress, before it has any output."""
    sampling = served.request.sampling
    tools = [
        {"type": "function", "description": None, "parameters": {}, "strict": False, **tool} for tool in _tools(body)
    ]
    return {
        "id": f"resp_{new_id()}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": served.model,
        "output": [],
        "parallel_tool_calls": served.request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": (body.text.format if body.text is not None else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _status(reason: FinishReason) -> Literal["completed", "incomplete"]:
    return "incomplete" if reason in ("length", "abort") else "completed"


def _finished(head: Response, output: list[OutputItem], result: Result) -> Response:
    status = _status(result.finish_reason)
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output,
        "usage": _usage(result.usage),
    }


def _usage(usage: Usage) -> ResponseUsage:
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


def _output(choice: Choice) -> list[OutputItem]:
    """Return the output items of a finished answer, without the reasoning, as OpenAI does."""
    items: list[OutputItem] = []
    status = _status(choice.finish_reason)
    if choice.text or not choice.tool_calls:
        items.append(_message_item(_item_id("msg"), choice.text, choice.logprobs, status))
    items += [_call_item(call.id, call.name, call.arguments, status) for call in choice.tool_calls]
    return items


def _item_id(prefix: str) -> str:
    return f"{prefix}_{new_id()}"


def _text_part(text: str, logprobs: tuple[TokenLogprob, ...] | None) -> OutputText:
    tokens = [] if logprobs is None else read_logprobs(logprobs)["content"]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _message_item(ident: str, text: str, logprobs: tuple[TokenLogprob, ...] | None, status: ItemStatus) -> MessageItem:
    content = [] if status == "in_progress" else [_text_part(text, logprobs)]
    return {"id": ident, "type": "message", "role": "assistant", "status": status, "content": content}


def _call_item(call_id: str, name: str, arguments: str, status: ItemStatus) -> CallItem:
    return {
        "id": _item_id("fc"),
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


class TextPosition(TypedDict):
    """The item and content part that a text event belongs to."""

    output_index: int
    item_id: str
    content_index: int


class EventWriter:
    """Writes the numbered events of a streamed response: each item is added, filled by deltas, and closed."""

    def __init__(self, head: Response) -> None:
        self._head = head
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._items: list[OutputItem] = []
        self._message: TextPosition | None = None
        self._calls: dict[int, tuple[int, CallItem]] = {}

    def event(self, kind: str, **fields: Unpack[ResponseEvent]) -> bytes:
        """Return one event with the next sequence number."""
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps(value))

    def write(self, chunk: Chunk) -> bytes:
        """Return the events of one chunk; the first call also opens the response."""
        events = self._open() + (self._delta(chunk) if chunk.text or chunk.logprobs else b"")
        return events + b"".join(map(self._call, chunk.tool_calls))

    def _open(self) -> bytes:
        if self._number:
            return b""
        opened = self.event("response.created", response=self._head)
        return opened + self.event("response.in_progress", response=self._head)

    def _delta(self, chunk: Chunk) -> bytes:
        events = b""
        if self._message is None:
            item = _message_item(_item_id("msg"), "", None, "in_progress")
            self._message = {"output_index": len(self._items), "item_id": item["id"], "content_index": 0}
            self._items.append(item)
            events = self.event("response.output_item.added", output_index=self._message["output_index"], item=item)
            events += self.event("response.content_part.added", **self._message, part=_text_part("", None))
        self._text.append(chunk.text)
        self._logprobs += chunk.logprobs
        tokens = _bare(read_logprobs(chunk.logprobs)["content"])
        return events + self.event("response.output_text.delta", **self._message, delta=chunk.text, logprobs=tokens)

    def _call(self, delta: ToolCallDelta) -> bytes:
        events = b""
        if delta.index not in self._calls:
            item = _call_item(delta.id or "", delta.name or "", "", "in_progress")
            self._calls[delta.index] = len(self._items), item
            events = self.event("response.output_item.added", output_index=len(self._items), item=item)
            self._items.append(item)
        index, call = self._calls[delta.index]
        if not delta.arguments:
            return events
        call["arguments"] += delta.arguments
        return events + self.event(
            "response.function_call_arguments.delta", output_index=index, item_id=call["id"], delta=delta.arguments
        )

    def close(self, result: Result) -> bytes:
        """Return the closing events of every item and of the response."""
        events = self._open()
        if not self._items:
            events += self._delta(Chunk())
        status = _status(result.finish_reason)
        output = [self._closed(item, status) for item in self._items]
        events += b"".join(self._closing(index, item) for index, item in enumerate(output))
        whole = _finished(self._head, output, result)
        return events + self.event(f"response.{whole['status']}", response=whole)

    def _closed(self, item: OutputItem, status: ItemStatus) -> OutputItem:
        if item["type"] == "function_call":
            return {**item, "status": status}
        return _message_item(item["id"], "".join(self._text), tuple(self._logprobs) or None, status)

    def _closing(self, index: int, item: OutputItem) -> bytes:
        if item["type"] == "function_call":
            events = self.event(
                "response.function_call_arguments.done",
                output_index=index,
                item_id=item["id"],
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            position: TextPosition = {"output_index": index, "item_id": item["id"], "content_index": 0}
            tokens = _bare(part["logprobs"])
            events = self.event("response.output_text.done", **position, text=part["text"], logprobs=tokens)
            events += self.event("response.content_part.done", **position, part=part)
        return events + self.event("response.output_item.done", output_index=index, item=item)


def _bare(logprobs: list[ChosenToken]) -> list[EventToken]:
    """Return logprobs for delta events, which have no `bytes`; the finished item has them."""
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
