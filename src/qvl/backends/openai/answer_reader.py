"""Converts the events of a streamed chat completion to Chunks.

Variants of OpenAI's format are supported: reasoning as `reasoning_content`, `reasoning` or an inline
`<think>` block, parallel tool calls that share an index or have none, logprobs with raw bytes, picture tokens in the
usage, finish reasons of other dialects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from qvl.backends.openai.call_assembler import CallAssembler
from qvl.backends.openai.failures import Failed, Impact, Repeat, broken, cut_off, from_event
from qvl.backends.openai.finish_words import meaning_of
from qvl.backends.openai.wire import (
    WireChoice,
    WireEvent,
    WireLogprob,
    WireMessage,
    WirePart,
    WirePromptLogprob,
    WireToolCall,
    WireUsage,
)
from qvl.chunks import lone_end
from qvl.errors import RefusalError
from qvl.http.sse import readable, shorten
from qvl.types import Chunk, FinishReason, PromptFacts, Timing, TokenLogprob, ToolCallDelta, Usage

_IMAGE_TOKENS: Final = ("image_tokens", "vision_tokens", "multimodal_tokens")
_NOTE: Final = 2000
_NO_USAGE: Final = Usage()
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WHITE: Final = " \t\n\r"
_decode: Final = json.JSONDecoder().raw_decode


class ThinkSplitter:
    """Separates a leading `<think>…</think>` from the text of one choice, even if a tag is split over pieces.

    With `opened`, the chat template is known to open the block: text is withheld until `</think>`, and is the answer if
    that never comes. `opened_by_template` is the conclusion for later answers.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._state = "start"
        self._pending = ""
        self._opened = opened
        self._kept: list[str] = []
        self._tail = ""

    @property
    def opened_by_template(self) -> bool:
        """True if the answer had `</think>` without `<think>`; `opened` if the answer does not show it."""
        if self._state != "text":
            return self._opened
        text = "".join(self._kept)
        at = lone_end(text)
        return at is not None and text.startswith("</think>\n", at)

    def split(self, text: str) -> tuple[str, str]:
        """Return (text, reasoning) of this piece; a possible beginning of a tag is withheld."""
        if self._state == "answer":
            return text, ""
        if self._state == "text":
            self._kept.append(text)
            return text, ""
        if self._state == "gap":
            return self._after(text), ""
        if self._state == "opened":
            return self._withhold(text)
        self._pending += text
        if self._state == "start":
            lead = self._pending.lstrip()
            if lead.startswith("<think>"):
                self._opened = False
                self._state, self._pending = "think", lead[len("<think>") :].lstrip("\n")
            elif "<think>".startswith(lead):
                return "", ""
            else:
                whole, self._pending = self._pending, ""
                if self._opened:
                    self._state = "opened"
                    return self._withhold(whole)
                return self._to_text(whole), ""
        return self._thinking()

    def reasoned_elsewhere(self) -> None:
        """Record that the endpoint sends reasoning in a field of its own: the content is the answer."""
        self._opened = False

    def flush(self, *, cut_off: bool = False) -> tuple[str, str]:
        """Return the withheld (text, reasoning) at the end of the choice; `cut_off`: it ended at max_tokens."""
        if self._state == "opened":
            rest, self._kept = "".join(self._kept), []
            # A whole answer without the end of a block had none: the next one is not held back for it.
            self._opened = cut_off
            return ("", rest) if cut_off else (rest, "")
        rest, self._pending = self._pending, ""
        return ("", rest) if self._state == "think" else (rest, "")

    def _withhold(self, text: str) -> tuple[str, str]:
        self._kept.append(text)
        if self._opened and "</think>" not in self._tail + text:
            self._tail = (self._tail + text)[-len("</think>") :]
            return "", ""
        whole = "".join(self._kept)
        if not self._opened:
            self._kept = []
            return self._to_text(whole), ""
        self._tail = ""
        at = lone_end(whole)
        if at is None:
            return "", ""
        self._state, self._kept = "gap", []
        return self._after(whole[at + len("</think>") :]), whole[:at].strip("\n")

    def _thinking(self) -> tuple[str, str]:
        before, tag, after = self._pending.partition("</think>")
        if tag:
            self._state, self._pending = "gap", ""
            return self._after(after), before.rstrip("\n")
        keep = next((n for n in range(7, 0, -1) if before.endswith("</think>"[:n])), 0)
        self._pending = before[len(before) - keep :]
        return "", before[: len(before) - keep]

    def _after(self, text: str) -> str:
        """Return the beginning of the answer without the line breaks after the block."""
        rest = text.lstrip("\n")
        if rest:
            self._state = "answer"
        return rest

    def _to_text(self, text: str) -> str:
        self._state, self._pending = "text", ""
        self._kept.append(text)
        return text


class SurrogateJoiner:
    """Joins surrogate pairs that are split over two pieces; a lone surrogate becomes U+FFFD."""

    def __init__(self) -> None:
        self._high = ""

    def join(self, text: str) -> str:
        if not self._high and (text.isascii() or not _SURROGATE.search(text)):
            return text
        text = self._high + text
        self._high = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        whole = text[: len(text) - len(self._high)]
        return whole.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def flush(self) -> str:
        rest, self._high = self._high, ""
        return "\ufffd" if rest else ""


@dataclass(slots=True)
class ChoiceReader:
    """The state of one choice between events."""

    think: ThinkSplitter
    calls: CallAssembler = field(default_factory=CallAssembler)
    joiners: dict[object, SurrogateJoiner] = field(default_factory=dict)
    refusal: str = ""
    answered: bool = False
    finished: bool = False

    def joined(self, key: object, text: str) -> str:
        if not text or (text.isascii() and key not in self.joiners):
            return text
        return self.joiners.setdefault(key, SurrogateJoiner()).join(text)

    def rest(self, key: object) -> str:
        return self.joiners[key].flush() if key in self.joiners else ""


class AnswerReader:
    """Converts event payloads, one by one, to Chunks.

    The chunk with the finish_reason is withheld until the usage arrives, so that the last chunk of the stream has both.
    `opened`: the model's chat template is known to open the `<think>` block.

    Raises:
        Failed: (from `read` and `end`) an error event, an invalid event, an incomplete answer, a refusal.
    """

    def __init__(self, *, n: int, where: str, opened: bool = False) -> None:
        self._n = n
        self._where = where
        self._opened = opened
        self._choices: dict[int, ChoiceReader] = {}
        self._last: partial[Chunk] | None = None
        self._prompt: PromptFacts | None = None
        self._notes: tuple[str, ...] = ()
        self.usage = _NO_USAGE
        self.done = False

    @property
    def opened_by_template(self) -> bool:
        """True if an answer had a `</think>` without `<think>`, so that the text before it was reasoning."""
        return any(choice.think.opened_by_template for choice in self._choices.values())

    def read(self, payload: bytes) -> list[Chunk]:
        """Return the chunks of one event. `[DONE]` sets `done`, and finishes choices without a finish reason."""
        chunks: list[Chunk] = []
        if payload.strip() == b"[DONE]":
            self.done = True
            for index, state in self._choices.items():
                if not state.finished:
                    self._finish_unsaid(index, state, chunks)
            return chunks
        event = self._parse(payload)
        if event.get("error") or event.get("object") == "error":
            raise from_event(event.get("error") or event, self._where)
        if "choices" not in event and ("detail" in event or "message" in event):
            raise from_event(event, self._where)
        try:
            if usage := event.get("usage"):
                self.usage = read_usage(usage)
            if told := event.get("notes"):
                self._notes += _notes(told)
            if event.get("prompt_token_ids") or event.get("prompt_logprobs"):
                scores = tuple(map(_prompt_token, event.get("prompt_logprobs") or ()))
                self._prompt = PromptFacts(tuple(event.get("prompt_token_ids") or ()), logprobs=scores)
            for choice in event.get("choices") or ():
                if (said := self._choice(choice)) is not None:
                    self._deliver(said, chunks)
        except (TypeError, ValueError, KeyError, AttributeError) as exc:
            raise broken(f"invalid event: {readable(payload)}", self._where) from exc
        return chunks

    def _deliver(self, said: Chunk | partial[Chunk], chunks: list[Chunk]) -> None:
        """Add to `chunks` what was withheld, and then `said`; the end of a choice is withheld."""
        if self._last is not None:
            chunks.append(self._last())
            self._last = None
        if isinstance(said, Chunk):
            chunks.append(said)
        else:
            self._last = said

    def _finish_unsaid(self, index: int, state: ChoiceReader, chunks: list[Chunk]) -> None:
        """End a choice without a finish reason; not one that has no answer, or an incomplete call."""
        said = self._choice({"index": index, "finish_reason": "stop"})
        state.finished = state.answered and state.calls.whole
        if state.finished and said is not None:
            self._deliver(said, chunks)

    def end(self, timing: Timing | None = None) -> Chunk:
        """Return the last chunk, with finish_reason, usage and `timing`."""
        finished = sum([choice.finished for choice in self._choices.values()])
        if self._last is None or finished < self._n:
            if not self._choices:
                raise cut_off("the stream ended without an answer", self._where)
            if finished and self._last is not None:
                raise broken(f"expected n={self._n} answers, got {finished}", self._where)
            raise cut_off("the stream broke off before the answer was complete", self._where)
        return self._last(usage=self.usage, timing=timing, notes=self._notes)

    def _parse(self, payload: bytes) -> WireEvent:
        event: WireEvent
        try:
            text = payload.decode().strip(_WHITE)
            event, end = _decode(text)
            if end != len(text):
                raise ValueError("more than one value")
        except UnicodeDecodeError as exc:
            raise broken(f"the stream is not UTF-8: {readable(payload)}", self._where) from exc
        except (ValueError, RecursionError) as exc:
            raise broken(f"the stream has broken JSON: {readable(payload)}", self._where) from exc
        if not isinstance(event, dict):
            raise broken(f"invalid event, not an object: {readable(payload)}", self._where)
        return event

    def _choice(self, choice: WireChoice) -> Chunk | partial[Chunk] | None:
        """Return the chunk of one choice of an event; None if it says nothing. The last one is yet to be made."""
        index = int(choice.get("index") or 0)
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = ChoiceReader(ThinkSplitter(opened=self._opened))
        # Some end with the whole message once more.
        delta: WireMessage = choice.get("delta") or ({} if state.answered else choice.get("message")) or {}
        text, reasoning = self._words(delta, state) if delta else ("", "")
        calls = _calls(delta, state) if "tool_calls" in delta or "function_call" in delta else ()
        reason = choice.get("finish_reason")
        finish = None if reason is None else self._finish(reason, state)
        if finish is not None:
            rest, rest_reasoning = state.think.flush(cut_off=finish == "length")
            text += rest
            reasoning += rest_reasoning
            if state.joiners:
                text += state.rest("text")
                reasoning += state.rest("reasoning")
                calls += tuple(
                    ToolCallDelta(index=at, arguments=rest)
                    for at in range(len(state.calls))
                    if (rest := state.rest(at))
                )
            state.finished = True
        if not state.answered:
            state.answered = bool(calls or text.strip())
        told = choice.get("logprobs")
        logprobs = tuple(map(_logprob, told.get("content") or ())) if told else ()
        ids = tuple(choice.get("token_ids") or ())
        if not (text or reasoning or calls or logprobs or finish or ids):
            return None
        prompt, self._prompt = self._prompt, None
        if finish is None:
            return Chunk(text, index, reasoning, calls, logprobs, token_ids=ids, prompt=prompt)
        stop = choice.get("stop_reason") if finish == "stop" else None
        if not isinstance(stop, str):
            stop = None
        return partial(
            Chunk, text, index, reasoning, calls, logprobs, finish, token_ids=ids, prompt=prompt, stop_string=stop
        )

    @staticmethod
    def _words(delta: WireMessage, state: ChoiceReader) -> tuple[str, str]:
        """Return (text, reasoning) of a delta; a refusal is kept in `state`."""
        own = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if own and (own := state.joined("reasoning", own)):
            state.think.reasoned_elsewhere()
        content, refused = delta.get("content"), ""
        if content is None:
            content = ""
        elif not isinstance(content, str):
            content, refused = _content(content)
        text = reasoning = ""
        if content or own:
            text, reasoning = state.think.split(state.joined("text", content))
        if refusal := (delta.get("refusal") or "") + refused:
            state.refusal += state.joined("refusal", refusal)
        return text, own + reasoning

    def _finish(self, reason: str | None, state: ChoiceReader) -> FinishReason | None:
        meaning = meaning_of(reason)
        if meaning is None:
            return None
        if state.refusal or meaning == "refused":
            detail = f": {shorten(state.refusal)}" if state.refusal else ""
            raise Failed(RefusalError(f"{self._where}: the model refused to answer{detail}"), Repeat.NEVER, Impact.NONE)
        if meaning == "withheld":
            detail = f"{self._where}: the endpoint's content filter withheld the answer"
            raise Failed(RefusalError(detail, code="content_filter"), Repeat.NEVER, Impact.NONE)
        if meaning == "failed":
            raise broken(f"the endpoint aborted the answer: {shorten(str(reason))}", self._where)
        if meaning == "length":
            return "length"
        return "tool_calls" if meaning == "tool_calls" or state.calls else "stop"


def _calls(delta: WireMessage, state: ChoiceReader) -> tuple[ToolCallDelta, ...]:
    """Return what a delta says of tool calls."""
    calls: Sequence[WireToolCall] = delta.get("tool_calls") or ()
    if not calls and isinstance(older := delta.get("function_call"), dict):
        calls = ({"index": 0, "function": older},)
    return tuple(replace(call, arguments=state.joined(call.index, call.arguments)) for call in state.calls.read(calls))


def read_usage(usage: WireUsage) -> Usage:
    """Return the token counts of an OpenAI usage object; missing and negative ones are 0."""
    details = usage.get("prompt_tokens_details") or {}
    said = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        image_tokens=_count(next((count for name in _IMAGE_TOKENS if (count := details.get(name))), None)),
        cached_tokens=_count(details.get("cached_tokens")),
        video_tokens=_count(details.get("video_tokens")),
        # SGLang has it beside the others.
        reasoning_tokens=_count(said.get("reasoning_tokens") or usage.get("reasoning_tokens")),
    )


def _count(tokens: int | None) -> int:
    return max(0, int(tokens or 0))


def _notes(told: object) -> tuple[str, ...]:
    """Return what qvl-serve says that it did otherwise than asked."""
    return tuple(note[:_NOTE] for note in told if isinstance(note, str)) if isinstance(told, list) else ()


def _content(content: list[WirePart]) -> tuple[str, str]:
    """Return (text, refusal); some gateways stream content as parts."""
    return "".join(part.get("text") or "" for part in content), "".join(part.get("refusal") or "" for part in content)


def _prompt_token(alternatives: dict[str, WirePromptLogprob] | None) -> TokenLogprob | None:
    """Return the token of one place of a prompt, which comes last, with its alternatives."""
    if not alternatives:
        return None
    read = [
        TokenLogprob(
            one["decoded_token"], one["logprob"], one["decoded_token"].encode(), id=int(ident), rank=one["rank"]
        )
        for ident, one in alternatives.items()
    ]
    return replace(read[-1], top=tuple(sorted(read, key=lambda token: token.rank)))


def _logprob(item: WireLogprob) -> TokenLogprob:
    raw = item.get("bytes")
    return TokenLogprob(
        token=item["token"],
        logprob=float(item["logprob"]),
        bytes=bytes(raw) if raw is not None else item["token"].encode("utf-8", "replace"),
        top=tuple(_logprob(top) for top in item.get("top_logprobs") or ()),
    )
