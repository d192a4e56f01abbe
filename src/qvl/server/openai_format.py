"""Conversion of qvl's results to the objects of OpenAI's answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qvl.ids import new_id
from qvl.server.answers import (
    Alternative,
    AnswerHead,
    AssistantMessage,
    CalledFunction,
    ChatLogprobs,
    FinishWord,
    FunctionCall,
    Notes,
    PromptDetails,
    PromptLogprob,
    TokenUsage,
    data_event,
)
from qvl.types import Choice, Chunk, FinishReason, PromptFacts, Result, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.server.schemas import StreamOptions

DONE: Final = b"data: [DONE]\n\n"


def answer_head(prefix: str, model: str, fingerprint: str, created: float = 0.0, ident: str = "") -> AnswerHead:
    """Return the fields that every answer begins with; `created` is seconds since the epoch, 0 for now.

    `ident` is the id that the client gave the request.
    """
    return {
        "id": f"{prefix}-{ident or new_id()}",
        "created": int(created or time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def finish_word(reason: FinishReason) -> FinishWord:
    """Return OpenAI's finish_reason; it has no word for an answer that the server aborted."""
    return "length" if reason == "abort" else reason


def message_of(choice: Choice, echo: str = "", *, reasoning: bool = True) -> AssistantMessage:
    """Return the assistant's message, behind the text `echo`, with its reasoning if that is wanted."""
    text = echo + choice.text
    message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if choice.tool_calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    if choice.reasoning and reasoning:
        # Its name in DeepSeek's API, and in OpenRouter's, which vLLM took over.
        message["reasoning_content"] = message["reasoning"] = choice.reasoning
    return message


def prompt_scores(prompt: PromptFacts) -> list[dict[str, PromptLogprob] | None]:
    """Return vLLM's `prompt_logprobs`: of each token of the prompt, the alternatives and itself by their ids."""
    return [
        None
        if token is None
        else {
            str(one.id): {"logprob": max(one.logprob, -9999.0), "rank": one.rank, "decoded_token": one.token}
            for one in (*(top for top in token.top if top.id != token.id), token)
        }
        for token in prompt.logprobs
    ]


def tool_delta(call: ToolCallDelta) -> FunctionCall:
    """Return the fragment of a tool call in a stream event."""
    function: CalledFunction = {"arguments": call.arguments}
    if call.name is not None:
        function = {"name": call.name, "arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def read_logprobs(tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Return OpenAI's logprobs object of a chat answer."""
    return {
        "content": [{**_logprob(token), "top_logprobs": [_logprob(top) for top in token.top]} for token in tokens],
        "refusal": None,
    }


def _logprob(token: TokenLogprob) -> Alternative:
    raw = token.bytes or token.token.encode("utf-8", "replace")
    # JSON has no minus infinity, and OpenAI's own floor is this one.
    return {"token": token.token, "logprob": max(token.logprob, -9999.0), "bytes": list(raw)}


def usage_of(usage: Usage) -> TokenUsage:
    """Return OpenAI's usage object, with `image_tokens` beside `cached_tokens`."""
    details: PromptDetails = {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens}
    if usage.video_frames:
        details |= {"video_tokens": usage.video_tokens, "video_frames": usage.video_frames}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def notes_of(*results: Result) -> Notes:
    """Return the field of an answer with the notes of its results; {} if there are none."""
    notes = [note for result in results for note in result.notes]
    return {"notes": [*dict.fromkeys(notes)]} if notes else {}


class StreamUsage:
    """The `usage` of stream events, as requested by `stream_options`.

    With `continuous_usage_stats` it counts the tokens so far: until the backend reports its counts with the last chunk,
    a chunk counts as its number of logprobs or one token, and a prompt as 0 if the backend did not tell its length with
    the first. As in vLLM, that needs `include_usage`.
    """

    def __init__(self, options: StreamOptions | None) -> None:
        self._included = bool(options and options.include_usage)
        self._continuous = self._included and bool(options and options.continuous_usage_stats)
        self._usages: dict[int, Usage] = {}

    def after(self, chunk: Chunk, number: int = 0) -> dict[str, TokenUsage | None]:
        """Return the `usage` field for the events of `chunk`, of the prompt `number`; {} if not requested."""
        if not self._continuous:
            return {"usage": None} if self._included else {}
        tokens = len(chunk.logprobs) or int(bool(chunk.text or chunk.reasoning or chunk.tool_calls))
        usage = self._usages.get(number) or chunk.prompt_usage or Usage()
        said, thought = usage.completion_tokens, usage.reasoning_tokens
        thought += tokens if chunk.reasoning and not chunk.text else 0
        usage = chunk.usage or replace(usage, completion_tokens=said + tokens, reasoning_tokens=thought)
        self._usages[number] = usage
        return {"usage": usage_of(Usage.sum(self._usages.values()))}

    def close(self, head: Mapping[str, object], result: Result, empty: Mapping[str, object]) -> bytes:
        """Return the final event with the usage, if requested, and the notes, if there are any; then `[DONE]`.

        Without the usage it has the choice `empty`: clients that asked for none expect one in every event.
        """
        notes = notes_of(result)
        if self._included:
            return data_event({**head, **notes, "usage": usage_of(result.usage)}) + DONE
        return data_event({**head, "choices": [empty], **notes}) + DONE if notes else DONE
