"""Output items of the Responses API, whole and as the events of a stream."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from qvl.errors import QvlError
from qvl.server.answers import (
    CallItem,
    ChosenToken,
    EventToken,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseEvent,
    ResponseUsage,
    SummaryText,
    dumps,
)
from qvl.server.openai_format import notes_of, read_logprobs
from qvl.server.signing import signed
from qvl.types import Choice, Chunk, FinishReason, Result, TokenLogprob, ToolCallDelta, Usage


@dataclass(slots=True)
class ItemMaker:
    """Makes the items of one response. An item's id holds that of its response, so that it can be found again.

    Args:
        response_id: `resp_…`.
        summary: True if reasoning is given as a summary, which is where clients that ask for one look.
        key: the key that reasoning is signed with as `encrypted_content`; None for none.
        reasoning_shown: False if the answer is given without its reasoning.
    """

    response_id: str
    summary: bool = False
    key: bytes | None = None
    reasoning_shown: bool = True
    _count: int = 0

    def _id(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self.response_id.partition('_')[2]}{self._count:02x}"

    def message(self) -> MessageItem:
        return {"id": self._id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}

    def call(self, call_id: str, name: str, arguments: str = "") -> CallItem:
        return {
            "id": self._id("fc"),
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": arguments,
            "status": "in_progress",
        }

    def reasoning(self) -> ReasoningItem:
        return {
            "id": self._id("rs"),
            "type": "reasoning",
            "status": "in_progress",
            "summary": [],
            "content": [],
            "encrypted_content": None,
        }

    def thought(self, item: ReasoningItem, text: str) -> ReasoningItem:
        """Return the finished reasoning item."""
        sealed = None if self.key is None else signed(text, self.key)
        whole: ReasoningItem = {**item, "status": "completed", "encrypted_content": sealed}
        if self.summary:
            return {**whole, "summary": [{"type": "summary_text", "text": text}]}
        return {**whole, "content": [{"type": "reasoning_text", "text": text}]}

    def items(self, choice: Choice) -> list[OutputItem]:
        """Return the output items of a finished answer."""
        items: list[OutputItem] = []
        status = _status(choice.finish_reason)
        if choice.reasoning and self.reasoning_shown:
            items.append(self.thought(self.reasoning(), choice.reasoning))
        if choice.text or not choice.tool_calls:
            items.append({**self.message(), "status": status, "content": [_text_part(choice.text, choice.logprobs)]})
        for call in choice.tool_calls:
            items.append({**self.call(call.id, call.name, call.arguments), "status": status})
        return items


def _status(reason: FinishReason) -> Literal["completed", "incomplete"]:
    return "incomplete" if reason in ("length", "abort") else "completed"


def finished(head: Response, output: list[OutputItem], result: Result) -> Response:
    """Return the finished response that began as `head`."""
    status = _status(result.finish_reason)
    return {
        **head,
        "status": status,
        "completed_at": int(time.time()) if status == "completed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output,
        "usage": _usage(result.usage),
        **notes_of(result),
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
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _text_part(text: str, logprobs: tuple[TokenLogprob, ...] | None) -> OutputText:
    tokens = [] if logprobs is None else read_logprobs(logprobs)["content"]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


class TextPosition(TypedDict):
    """The item and content part that a text event belongs to."""

    output_index: int
    item_id: str
    content_index: int


class ThoughtPosition(TypedDict, total=False):
    """The item and part that an event of reasoning belongs to."""

    output_index: int
    item_id: str
    content_index: int
    summary_index: int


class EventWriter:
    """Writes the numbered events of a streamed response: each item is added, filled by deltas, and closed."""

    def __init__(self, head: Response, maker: ItemMaker) -> None:
        self._head = head
        self._maker = maker
        self.whole: Response | None = None
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._items: list[OutputItem] = []
        self._thought: list[str] = []
        self._reasoning: int | None = None
        self._message: TextPosition | None = None
        self._calls: dict[int, tuple[int, CallItem]] = {}

    def event(self, kind: str, **fields: Unpack[ResponseEvent]) -> bytes:
        """Return one event with the next sequence number."""
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps(value))

    def write(self, chunk: Chunk) -> bytes:
        """Return the events of one chunk; the first call also opens the response."""
        events = self._open()
        if chunk.reasoning and self._maker.reasoning_shown:
            events += self._think(chunk.reasoning)
        # The tokens of reasoning have logprobs too, and no item to stand in.
        if chunk.text or (chunk.logprobs and not chunk.reasoning):
            events += self._thought_out() + self._delta(chunk)
        if chunk.tool_calls:
            events += self._thought_out()
        return events + b"".join(map(self._call, chunk.tool_calls))

    def failed(self, error: QvlError) -> bytes:
        """Return the event of an error, behind which there are no others."""
        return self.event("error", code=error.code, message=str(error), param=error.param)

    def _open(self) -> bytes:
        if self._number:
            return b""
        opened = self.event("response.created", response=self._head)
        return opened + self.event("response.in_progress", response=self._head)

    def _think(self, text: str) -> bytes:
        events = b""
        if self._reasoning is None:
            item = self._maker.reasoning()
            self._reasoning = len(self._items)
            self._items.append(item)
            events = self.event("response.output_item.added", output_index=self._reasoning, item=item)
            events += self._part_of_thought("added", "")
        self._thought.append(text)
        if self._maker.summary:
            return events + self.event("response.reasoning_summary_text.delta", **self._place_of_thought(), delta=text)
        return events + self.event("response.reasoning_text.delta", **self._place_of_thought(), delta=text)

    def _thought_out(self) -> bytes:
        """Return the closing events of the reasoning, if it is open: it ends where the answer begins."""
        if self._reasoning is None:
            return b""
        item = self._maker.thought(self._items[self._reasoning], "".join(self._thought))  # type: ignore[arg-type]
        self._items[self._reasoning] = item
        events = self._closing(self._reasoning, item)
        self._reasoning = None
        self._thought.clear()
        return events

    def _place_of_thought(self) -> ThoughtPosition:
        assert self._reasoning is not None
        place: ThoughtPosition = {"output_index": self._reasoning, "item_id": self._items[self._reasoning]["id"]}
        if self._maker.summary:
            return {**place, "summary_index": 0}
        return {**place, "content_index": 0}

    def _part_of_thought(self, what: Literal["added", "done"], text: str) -> bytes:
        if self._maker.summary:
            summary: SummaryText = {"type": "summary_text", "text": text}
            return self.event(f"response.reasoning_summary_part.{what}", **self._place_of_thought(), part=summary)
        part: ReasoningText = {"type": "reasoning_text", "text": text}
        return self.event(f"response.content_part.{what}", **self._place_of_thought(), part=part)

    def _delta(self, chunk: Chunk) -> bytes:
        events = b""
        if self._message is None:
            item = self._maker.message()
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
            item = self._maker.call(delta.id or "", delta.name or "")
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
        events = self._open() + self._thought_out()
        if self._message is None and not self._calls:
            events += self._delta(Chunk())
        status = _status(result.finish_reason)
        output = [self._closed(item, status) for item in self._items]
        events += b"".join(self._closing(at, item) for at, item in enumerate(output) if item["type"] != "reasoning")
        self.whole = finished(self._head, output, result)
        return events + self.event(f"response.{self.whole['status']}", response=self.whole)

    def _closed(self, item: OutputItem, status: ItemStatus) -> OutputItem:
        if item["type"] == "function_call":
            return {**item, "status": status}
        if item["type"] == "reasoning":
            return item
        part = _text_part("".join(self._text), tuple(self._logprobs) or None)
        return {**item, "status": status, "content": [part]}

    def _closing(self, index: int, item: OutputItem) -> bytes:
        if item["type"] == "function_call":
            events = self.event(
                "response.function_call_arguments.done",
                output_index=index,
                item_id=item["id"],
                name=item["name"],
                arguments=item["arguments"],
            )
        elif item["type"] == "reasoning":
            text = "".join(self._thought)
            kind = "reasoning_summary_text" if self._maker.summary else "reasoning_text"
            events = self.event(f"response.{kind}.done", **self._place_of_thought(), text=text)
            events += self._part_of_thought("done", text)
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
