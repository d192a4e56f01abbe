"""`POST /v1/messages` and `/v1/messages/count_tokens`, in Anthropic's form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Unpack

from qvl.errors import QvlError, RateLimitError, RequestError
from qvl.ids import new_id
from qvl.pipeline.parse_parts import picture_texts
from qvl.server.answers import dumps
from qvl.server.errors import ErrorForm, status_of
from qvl.server.in_turn import InTurn, Piece
from qvl.server.messages_answers import (
    AnswerBlock,
    AnsweredMessage,
    BlockDelta,
    MessageError,
    MessageErrorFields,
    MessageEvent,
    MessageUsage,
    StopDelta,
    StopReason,
    TokenCount,
    ToolUseBlock,
)
from qvl.server.messages_input import Conversation
from qvl.server.messages_schemas import CountTokensRequest, MessagesRequest
from qvl.server.openai_format import notes_of
from qvl.server.serving import chat_request, name_request, read_request, refuse_untold, stream
from qvl.server.signing import signature_of
from qvl.types import Choice, Chunk, JsonObject, Result, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

OVERLOADED: Final = 529
# Told by it, a tool runner of Anthropic's client sends the whole conversation each time.
UNTHREADED: Final = "thread_unsupported_request"
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
# What stands for it in a request, unless it is there by its own name.
_SENT: Final = {
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "chat_template_kwargs.enable_thinking": "thinking.type",
    "chat_template_kwargs": "thinking",
}
_NAMES: Final = {
    "messages": "messages",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def message_status(error: QvlError) -> int:
    """Return the HTTP status of `error`: 529, where Anthropic says "overloaded", for a full queue."""
    if isinstance(error, RateLimitError) and error.code == "engine_overloaded":
        return OVERLOADED
    return status_of(error)


def message_error(error: QvlError, request_id: str) -> MessageError:
    """Return the body of `error`."""
    status = message_status(error)
    kind = _KINDS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    # Errors in this form have no field for the field at fault.
    where = "" if error.param is None or error.param in str(error) else f"{error.param}: "
    fields: MessageErrorFields = {"type": kind, "message": f"{where}{error}"}
    if error.code == UNTHREADED:
        fields["details"] = {"error_code": UNTHREADED, "unsupported": ["thread"]}
    return {"type": "error", "error": fields, "request_id": request_id}


MESSAGE_ERRORS: Final = ErrorForm(message_status, message_error, MessageError, b"request-id")


async def messages(exchange: Exchange) -> None:
    """Answer a conversation, as JSON or as server-sent events, in the form of Anthropic's Messages API."""
    body = await read_request(exchange, MessagesRequest, lambda body: picture_texts(body.messages, "content"))
    name_request(exchange, body)
    await exchange.until_done(lambda: _answer(exchange, body))


async def count_tokens(exchange: Exchange) -> None:
    """Answer with the number of tokens of a conversation as the model is shown it, pictures and tools included."""
    body = await read_request(exchange, CountTokensRequest, lambda body: picture_texts(body.messages, "content"))
    name_request(exchange, body)
    await exchange.until_done(lambda: _count(exchange, body))


async def _count(exchange: Exchange, body: CountTokensRequest) -> None:
    served = await _read(exchange, body)
    tokens = await exchange.core.pipeline.backend.tokenize(served.request)
    await exchange.respond_json(TokenCount(input_tokens=len(tokens.ids)))


async def _answer(exchange: Exchange, body: MessagesRequest) -> None:
    served = await _read(exchange, body)
    hidden = bool(body.thinking and body.thinking.get("display") == "omitted")
    form = MessageForm(served, hidden=hidden, left_out=body.include_reasoning is False)
    if body.stream:
        exchange.error_event = lambda error: _event("error", message_error(error, exchange.request_id))
        await stream(served, MessageWriter(form))
        return
    result = await served.answer()
    await exchange.respond_json(form.whole(result), served.headers(result))


async def _read(exchange: Exchange, body: CountTokensRequest) -> ServedRequest:
    refuse_untold(body, "return_token_ids", "prompt_logprobs", "logprob_token_ids")
    if (body.model_extra or {}).get("thread") is not None:
        what = "thread: no conversations are held on this server"
        raise RequestError(what, hint="send the whole conversation", param="thread", code=UNTHREADED)
    talk = Conversation(body.messages, body.system)
    exchange.picture_params = lambda: talk.picture_params
    params = body.sampling()
    extra = body.model_extra or {}
    fields: JsonObject = {**extra, **_thinking(body)}
    exchange.field_names = {**_NAMES, **{name: sent for name, sent in _SENT.items() if name not in extra}}
    if isinstance(body, MessagesRequest):
        params["max_tokens"] = body.max_tokens
        if body.stop_sequences:
            params["stop"] = body.stop_sequences
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format["schema"]}
        params["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.tools:
        params["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description"),
                    "parameters": tool["input_schema"],
                    "strict": tool.get("strict"),
                },
            }
            for tool in body.tools
        ]
    if (choice := body.tool_choice) is not None:
        if (choice["type"] == "tool") != ("name" in choice):
            fault = "belongs to the type 'tool'" if "name" in choice else "is missing"
            raise RequestError(f"tool_choice.name: {fault}", param="tool_choice.name", code="invalid_value")
        params["tool_choice"] = {"any": "required", "tool": choice.get("name", "")}.get(choice["type"], choice["type"])
        params["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
    if talk.is_prefilled:
        # The answer goes on where the last message ends.
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
        last = f"messages[{len(body.messages) - 1}]"
        exchange.field_names |= {"continue_final_message": last, "add_generation_prompt": last}
    return await chat_request(exchange, body.model, talk.messages, params, fields)


def _thinking(body: CountTokensRequest) -> JsonObject:
    """Return the fields of chat completions that say how much the model is to think."""
    fields: JsonObject = {}
    thinking = body.thinking
    if thinking is not None and thinking["type"] != "adaptive":
        fields["chat_template_kwargs"] = {"enable_thinking": thinking["type"] == "enabled"}
        if "budget_tokens" in thinking:
            fields["thinking_token_budget"] = thinking["budget_tokens"]
    if body.output_config is not None and (effort := body.output_config.effort) is not None:
        fields["reasoning_effort"] = effort
    return fields


class MessageForm:
    """Writes answers in Anthropic's form; `hidden`: thinking blocks have no text; `left_out`: there are none."""

    def __init__(self, served: ServedRequest, *, hidden: bool = False, left_out: bool = False) -> None:
        self.id = f"msg_{new_id()}"
        self.model = served.model
        self.hidden = hidden
        self.left_out = left_out
        self.stops = served.request.sampling.stop
        self._key = served.exchange.core.keys.signing_key

    def signature(self, thought: str) -> str:
        return signature_of(thought, self._key)

    def head(self, usage: Usage | None) -> AnsweredMessage:
        """Return the message before it has any content; `usage` is what is known of the prompt by then."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(usage or Usage()),
        }

    def whole(self, result: Result) -> AnsweredMessage:
        """Return the finished message."""
        choice = result.choices[0] if result.choices else Choice()
        content: list[AnswerBlock] = []
        if choice.reasoning and not self.left_out:
            thought = "" if self.hidden else choice.reasoning
            content.append({"type": "thinking", "thinking": thought, "signature": self.signature(choice.reasoning)})
        if choice.text:
            content.append({"type": "text", "text": choice.text})
        for call in choice.tool_calls:
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)})
        return {**self.head(result.usage), "content": content, **stop_of(result), **notes_of(result)}


def stop_of(result: Result) -> StopDelta:
    """Return why the answer ended, in Anthropic's words."""
    reason: str = result.finish_reason
    stopped = result.choices[0].stop_string if result.choices else None
    if stopped is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
    words: dict[str, StopReason] = {"length": "max_tokens", "abort": "max_tokens", "tool_calls": "tool_use"}
    words["content_filter"] = "refusal"
    return {"stop_reason": words.get(reason, "end_turn"), "stop_sequence": None}


def usage_of(usage: Usage) -> MessageUsage:
    """Return Anthropic's usage: what a prefix cache gave is counted apart from the other input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _object(arguments: str) -> JsonObject:
    """Return a call's arguments; those that are no JSON object stand under the name `arguments`."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _event(kind: str, value: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps(value))


class MessageWriter:
    """Writes the events of a streamed message: one block after the other, each started, filled and stopped."""

    def __init__(self, form: MessageForm) -> None:
        self._form = form
        self._begun = False
        self._count = 0
        # The block that is open: its type, or the number of the call that it holds.
        self._open: str | int | None = None
        self._thought: list[str] = []
        self._turns = InTurn()

    def write(self, chunk: Chunk) -> bytes:
        """Return the events of one chunk; the first call also starts the message."""
        events = b""
        if not self._begun:
            self._begun = True
            events = self._event("message_start", message=self._form.head(chunk.prompt_usage))
            events += _event("ping", {"type": "ping"})
        return events + b"".join(map(self._piece, self._turns.take(chunk)))

    def close(self, result: Result) -> bytes:
        """Return the events that end the message."""
        events = self.write(Chunk()) + b"".join(map(self._piece, self._turns.rest())) + self._stop()
        events += self._event("message_delta", delta=stop_of(result), usage=usage_of(result.usage), **notes_of(result))
        return events + self._event("message_stop")

    def _event(self, kind: str, **fields: Unpack[MessageEvent]) -> bytes:
        return _event(kind, {"type": kind, **fields})

    def _delta(self, delta: BlockDelta) -> bytes:
        return self._event("content_block_delta", index=self._count - 1, delta=delta)

    def _start(self, kind: str | int, block: AnswerBlock) -> bytes:
        """Return the events that close another block and start this one, unless it is open."""
        if self._open == kind:
            return b""
        events = self._stop()
        self._open = kind
        self._count += 1
        return events + self._event("content_block_start", index=self._count - 1, content_block=block)

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        events = b""
        if self._open == "thinking":
            signature = self._form.signature("".join(self._thought))
            events = self._delta({"type": "signature_delta", "signature": signature})
            self._thought.clear()
        self._open = None
        return events + self._event("content_block_stop", index=self._count - 1)

    def _piece(self, piece: Piece) -> bytes:
        if isinstance(piece, ToolCallDelta):
            return self._call(piece)
        kind, text = piece
        if kind == "text":
            return self._start("text", {"type": "text", "text": ""}) + self._delta({"type": "text_delta", "text": text})
        if self._form.left_out:
            return b""
        events = self._start("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._thought.append(text)
        return events if self._form.hidden else events + self._delta({"type": "thinking_delta", "thinking": text})

    def _call(self, delta: ToolCallDelta) -> bytes:
        block: ToolUseBlock = {"type": "tool_use", "id": delta.id or "", "name": delta.name or "", "input": {}}
        events = self._start(delta.index, block)
        if delta.arguments:
            events += self._delta({"type": "input_json_delta", "partial_json": delta.arguments})
        return events
