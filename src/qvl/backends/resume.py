"""Resumes a stream on another replica, which repeats the answer, by dropping the part already delivered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qvl.types import Chunk, ToolCallDelta


class Diverged(Exception):
    """The repeated answer differs from the first one, so the stream cannot be resumed."""


@dataclass(slots=True)
class _Part:
    """A streamed text; when it is repeated, `rest` returns only the part after the text so far."""

    sent: str = ""
    expected: str = ""

    def rest(self, text: str) -> str:
        if self.expected:
            known = min(len(self.expected), len(text))
            if text[:known] != self.expected[:known]:
                raise Diverged
            self.expected, text = self.expected[known:], text[known:]
        self.sent += text
        return text

    def again(self) -> None:
        self.expected = self.sent


@dataclass(slots=True)
class _Choice:
    text: _Part = field(default_factory=_Part)
    reasoning: _Part = field(default_factory=_Part)
    calls: dict[int, _Part] = field(default_factory=dict)
    logprobs: int = 0
    logprobs_to_skip: int = 0
    token_ids: int = 0
    token_ids_to_skip: int = 0
    finished: bool = False


class Continuation:
    """Removes the part of a repeated answer that was already delivered.

    Chunks of the first answer pass unchanged. After `again()` the same answer is expected from its beginning, and its
    delivered part is dropped, however it is cut into chunks.
    """

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._prompt_came = False

    @property
    def begun(self) -> bool:
        """True if anything was delivered."""
        return bool(self._choices)

    def again(self) -> None:
        """Expect the answer from its beginning again."""
        for choice in self._choices.values():
            for part in (choice.text, choice.reasoning, *choice.calls.values()):
                part.again()
            choice.logprobs_to_skip = choice.logprobs
            choice.token_ids_to_skip = choice.token_ids

    def rest(self, chunk: Chunk) -> Chunk | None:
        """Return the part of `chunk` that the caller has not received yet; None if it has received all of it.

        Raises:
            Diverged: the repeated part differs from the one received.
        """
        choice = self._choices.setdefault(chunk.index, _Choice())
        skip = min(choice.logprobs_to_skip, len(chunk.logprobs))
        choice.logprobs_to_skip -= skip
        ids = min(choice.token_ids_to_skip, len(chunk.token_ids))
        choice.token_ids_to_skip -= ids
        finish = None if choice.finished else chunk.finish_reason
        new = replace(
            chunk,
            text=choice.text.rest(chunk.text),
            reasoning=choice.reasoning.rest(chunk.reasoning),
            tool_calls=tuple(delta for call in chunk.tool_calls if (delta := _call(choice, call)) is not None),
            logprobs=chunk.logprobs[skip:],
            token_ids=chunk.token_ids[ids:],
            prompt=None if self._prompt_came else chunk.prompt,
            finish_reason=finish,
        )
        choice.logprobs += len(new.logprobs)
        choice.token_ids += len(new.token_ids)
        self._prompt_came = self._prompt_came or new.prompt is not None
        choice.finished = choice.finished or finish is not None
        said = new.text or new.reasoning or new.tool_calls or new.logprobs or new.token_ids or new.prompt
        empty = not (said or finish or new.usage)
        return None if empty and new != chunk else new


def _call(choice: _Choice, delta: ToolCallDelta) -> ToolCallDelta | None:
    known = choice.calls.get(delta.index)
    part = choice.calls.setdefault(delta.index, _Part())
    arguments = part.rest(delta.arguments)
    if known is None:
        return replace(delta, arguments=arguments)
    # The id was handed on with the first piece; the second answer has made up another.
    new = replace(delta, id=None, name=None, arguments=arguments)
    return new if arguments else None
