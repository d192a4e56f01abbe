"""Pieces of OpenAI's answers out of qvl's types."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import orjson

from qvl.types import Choice, Chunk, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.server.schemas import StreamOptions

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# OpenAI knows no "abort"; a choice that was cut short by the server's end is told as one that hit its limit.
_FINISH: Final = {"abort": "length"}


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which no UTF-8 can hold, becomes `?`."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return _encode(value).encode("utf-8", "replace")


def finish_word(reason: str) -> str:
    """A finish_reason in OpenAI's words."""
    return _FINISH.get(reason, reason)


def message_of(choice: Choice) -> dict[str, Any]:
    """The assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    return message


def tool_delta(call: ToolCallDelta) -> dict[str, Any]:
    """A piece of a tool call."""
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is not None:
        function = {"name": call.name, "arguments": call.arguments}
    found: dict[str, Any] = {"index": call.index, "function": function}
    if call.id is not None:
        found = {"index": call.index, "id": call.id, "type": "function", "function": function}
    return found


def read_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's logprobs object of a chat answer."""
    return {
        "content": [{**_logprob(token), "top_logprobs": [_logprob(top) for top in token.top]} for token in tokens],
        "refusal": None,
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    raw = token.bytes or token.token.encode("utf-8", "replace")
    # JSON has no minus infinity, and OpenAI's own floor is this one.
    return {"token": token.token, "logprob": max(token.logprob, -9999.0), "bytes": list(raw)}


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object, with the picture tokens beside the cached ones."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class RunningUsage:
    """The usage after each piece of a stream, for those who ask for it in every event.

    Until the backend tells its counts with the last piece, a piece counts as its logprobs, or as one token, and the
    prompt as nothing.
    """

    def __init__(self) -> None:
        self._usage = Usage()

    def after(self, chunk: Chunk) -> dict[str, Any]:
        told = bool(chunk.text or chunk.reasoning or chunk.tool_calls)
        more = len(chunk.logprobs) or int(told)
        so_far = replace(self._usage, completion_tokens=self._usage.completion_tokens + more)
        self._usage = chunk.usage or so_far
        return usage_of(self._usage)


def wants_running_usage(options: StreamOptions | None) -> bool:
    """As in vLLM, it is only given beside the usage of the whole."""
    return bool(options and options.include_usage and options.continuous_usage_stats)
