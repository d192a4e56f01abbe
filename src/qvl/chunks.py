"""Folds streamed Chunks into a whole answer, and unfolds a Result into Chunks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from qvl.types import (
    Choice,
    Chunk,
    FinishReason,
    PromptFacts,
    Result,
    Timing,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

_END: Final = "</think>"
_NO_USAGE: Final = Usage()
_NO_TIMING: Final = Timing()
_UNQUOTED_END: Final = re.compile(rf"(?<![`'\"“‘«]){_END}")


def fold(chunks: Iterable[Chunk], *, want_logprobs: bool = False) -> tuple[tuple[Choice, ...], Usage, Timing]:
    """Return (choices by index, usage, timing) folded from streamed chunks. Inverse of `unfold`."""
    folder = Folder(want_logprobs=want_logprobs)
    for chunk in chunks:
        folder.add(chunk)
    return folder.choices(), folder.usage, folder.timing


class _Pieces:
    """What came of one choice so far."""

    __slots__ = ("calls", "finish_reason", "logprobs", "reasoning", "stop_string", "text", "token_ids")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.token_ids: list[int] = []
        self.calls: dict[int, dict[str, str]] = {}
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None

    def add(self, chunk: Chunk) -> None:
        self.text.append(chunk.text)
        if chunk.reasoning:
            self.reasoning.append(chunk.reasoning)
        if chunk.logprobs:
            self.logprobs += chunk.logprobs
        if chunk.token_ids:
            self.token_ids += chunk.token_ids
        for delta in chunk.tool_calls:
            call = self.calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] = delta.id or call["id"]
            call["name"] = delta.name or call["name"]
            call["arguments"] += delta.arguments
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop_string = chunk.finish_reason, chunk.stop_string


class Folder:
    """Accumulates streamed chunks; `choices()` returns the answers so far."""

    __slots__ = ("_pieces", "_split_thought", "_want_logprobs", "notes", "prompt", "timing", "usage")

    def __init__(self, *, want_logprobs: bool = False, split_thought: bool = False) -> None:
        self._split_thought = split_thought
        self._want_logprobs = want_logprobs
        self._pieces: dict[int, _Pieces] = {}
        self.prompt: PromptFacts | None = None
        self.notes: tuple[str, ...] = ()
        self.usage = _NO_USAGE
        self.timing = _NO_TIMING

    @property
    def finished(self) -> bool:
        """True if every choice so far has its finish_reason."""
        return bool(self._pieces) and all(pieces.finish_reason is not None for pieces in self._pieces.values())

    def add(self, chunk: Chunk) -> None:
        pieces = self._pieces.get(chunk.index)
        if pieces is None:
            pieces = self._pieces[chunk.index] = _Pieces()
        pieces.add(chunk)
        self.prompt = chunk.prompt or self.prompt
        self.notes += chunk.notes
        self.usage = chunk.usage or self.usage
        self.timing = chunk.timing or self.timing

    def choices(self) -> tuple[Choice, ...]:
        return tuple([self._choice(index, pieces) for index, pieces in sorted(self._pieces.items())])

    def _choice(self, index: int, pieces: _Pieces) -> Choice:
        text, reasoning = "".join(pieces.text), "".join(pieces.reasoning)
        if self._split_thought and not reasoning and _END in text:
            reasoning, text = lone_thought(text)
        return Choice(
            index=index,
            text=text,
            reasoning=reasoning,
            tool_calls=tuple([ToolCall(**call) for _, call in sorted(pieces.calls.items())]),
            finish_reason=pieces.finish_reason or "abort",
            logprobs=tuple(pieces.logprobs) if self._want_logprobs else None,
            token_ids=tuple(pieces.token_ids),
            stop_string=pieces.stop_string,
        )


def lone_thought(text: str) -> tuple[str, str]:
    """Return (reasoning, answer) of a text whose `<think>` is in the prompt, so that it has only `</think>`.

    A tag that is quoted, in JSON or in a code block, or that follows a `<think>`, is part of the answer.
    """
    at = None if _is_json(text) else lone_end(text)
    return ("", text) if at is None else (text[:at].strip("\n"), text[at + len(_END) :].lstrip("\n"))


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def lone_end(text: str) -> int | None:
    """Return the index of the `</think>` that has no `<think>` before it in the text, or None."""
    if _END not in text:
        return None
    for match in _UNQUOTED_END.finditer(text):
        before = text[: match.start()]
        if "<think>" in before:
            return None
        if before.count("```") % 2 == 0:
            return match.start()
    return None


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk with what `chunks` of one choice say in their order; none of them is the last of its choice."""
    if len(chunks) == 1:
        return chunks[0]
    deltas: list[ToolCallDelta] = []
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        if deltas and deltas[-1].index == delta.index:
            deltas[-1] = replace(deltas[-1], arguments=deltas[-1].arguments + delta.arguments)
        else:
            deltas.append(delta)
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        index=chunks[0].index,
        reasoning="".join(chunk.reasoning for chunk in chunks),
        tool_calls=tuple(deltas),
        logprobs=tuple(token for chunk in chunks for token in chunk.logprobs),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        prompt=chunks[0].prompt,
        prompt_usage=chunks[0].prompt_usage,
        notes=tuple(note for chunk in chunks for note in chunk.notes),
    )


def unfold(result: Result) -> Iterable[Chunk]:
    """Yield the chunks that fold into `result`; a cache hit is streamed this way."""
    for choice in result.choices:
        last = choice is result.choices[-1]
        yield Chunk(
            text=choice.text,
            index=choice.index,
            reasoning=choice.reasoning,
            tool_calls=tuple(
                ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(choice.tool_calls)
            ),
            logprobs=choice.logprobs or (),
            finish_reason=choice.finish_reason,
            stop_string=choice.stop_string,
            usage=result.usage if last else None,
            timing=result.timing if last else None,
            token_ids=choice.token_ids,
            prompt=result.prompt if choice is result.choices[0] else None,
            prompt_usage=result.usage.of_prompt if choice is result.choices[0] else None,
            notes=result.notes if last else (),
        )
