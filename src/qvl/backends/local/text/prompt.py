"""Turns messages and tools into token ids: only the chat template's own markers become control tokens.

Text of users never becomes a control token, so a typed `<|im_end|>` ends no turn, a typed `<|image_pad|>` moves no
picture and a typed `<tool_response>` answers no call: it is encoded by a copy of the tokenizer without added tokens.
Text is encoded in pieces, so that a prompt beyond the context is refused before all of it is encoded.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from qvl.backends.local.text.template_options import NO_THOUGHT, TemplateOptions
from qvl.backends.local.text.xml_call import writes_xml
from qvl.errors import ContextLengthError, RequestError, first_line
from qvl.types import Message, Part, TextPart, VideoPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qvl.types import ChatRequest, JsonObject, Tool, ToolCall

# Stands behind the first character of typed control tokens while the template is rendered; never in Unicode text.
MARKS: Final = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")
# Characters that are encoded at a time, and looked at before the interpreter lets another thread run.
PIECE: Final = 1 << 16
# Characters of a piece whose tokens are kept for the next prompt that begins alike, and how many such are kept.
KEPT_PIECE: Final = 1 << 10
KEPT_PIECES: Final = 512
# Composing (NFC) makes one character of at most three bytes out of nine (Hangul), or of three times as many at most.
COMPOSED: Final = 3
DEFAULT_MAX_TOKENS: Final = 2048
VIDEO: Final = "<|vision_start|><|video_pad|><|vision_end|>"
PROBE: Final = "a system message between others"


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """The most tokens of a prompt: the context less `max_tokens` of the answer, by default less one."""

    context: int
    max_tokens: int | None = None

    def check(self, length: int, *, more: bool = False) -> None:
        """Raise ContextLengthError if a prompt of `length` tokens does not fit; `more`: it has at least as many."""
        if length + (self.max_tokens or 1) <= self.context:
            return
        answer = f" and max_tokens={self.max_tokens}" if self.max_tokens else ""
        raise ContextLengthError(
            f"a prompt of {'at least ' if more else ''}{length} tokens{answer} does not fit the context of"
            f" {self.context} tokens",
            hint="fewer or smaller pictures, less text, or a smaller max_tokens",
            param="max_tokens" if self.max_tokens and length < self.context else "messages",
        )

    @property
    def room(self) -> int:
        """The most tokens of a prompt."""
        return self.context - (self.max_tokens or 1)

    def answer_tokens(self, length: int) -> int:
        """Return the most tokens of the answer to a prompt of `length` tokens."""
        return self.max_tokens or min(self.context - length, DEFAULT_MAX_TOKENS)


class AbandonedError(RequestError):
    """The request was cancelled while it was prepared."""


class PromptEncoder:
    """Renders the chat template and encodes the prompt; thread-safe.

    Args:
        tokenizer: transformers' fast tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        self._ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._longest_first = sorted(self._ids, key=len, reverse=True)
        self._firsts = {token[:1] for token in self._longest_first}
        self._overlap = max(map(len, self._longest_first), default=1) - 1
        self._controls = re.compile("|".join(map(re.escape, self._longest_first)) or r"(?!)")
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        # The tokenizer works on bytes, so a token's length is that of its bytes.
        self._longest = max(map(len, self._plain.get_vocab()))
        template = json.dumps(tokenizer.chat_template)
        self._options = TemplateOptions(str(tokenizer.chat_template))
        self._splits_thoughts = "reasoning_content" in template and "</think>" in template
        self._xml_calls = writes_xml(tokenizer)
        self._drops_later_system: bool | None = None
        self._kept = lru_cache(KEPT_PIECES)(self._plain_ids)

    def encode(
        self, request: ChatRequest, limit: PromptLimit | None = None, abandoned: Callable[[], bool] = lambda: False
    ) -> tuple[list[int], bool]:
        """Return (token ids with one placeholder for each picture, True if the prompt ends in an open `<think>`).

        Raises:
            ContextLengthError: the text alone is beyond the limit.
            RequestError: the chat template refuses the messages.
            AbandonedError: `abandoned()` became true.
        """
        if isinstance(request.prompt, tuple):
            return self._checked(request.prompt), False
        texts = list(_texts(request))
        if limit is not None:
            least = sum(len(text) // (self._longest * (1 if text.isascii() else COMPOSED)) for text in texts)
            limit.check(least, more=True)
        mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise RequestError("the messages contain all four noncharacters U+FDD0 to U+FDD3", param="messages")
        if request.prompt is not None:
            pieces = _words(request.prompt, 0, len(request.prompt))
            return self._encoded(pieces, mark, request.cache_salt, limit, abandoned), False
        rendered = _with_times(self._render(request, mark), request)
        ids = self._encoded(self._pieces(rendered), mark, request.cache_salt, limit, abandoned)
        return ids, rendered[-64:].rstrip().endswith("<think>")

    def _checked(self, prompt: tuple[int, ...]) -> list[int]:
        """Return token ids that a request brings itself, each known to be the model's."""
        wrong = next((token for token in prompt if not 0 <= token < len(self._tokenizer)), None)
        if wrong is not None or not prompt:
            what = "the prompt is empty" if wrong is None else f"the prompt's token {wrong} is not in the vocabulary"
            raise RequestError(what, hint=f"ids from 0 to {len(self._tokenizer) - 1}", param="prompt")
        return list(prompt)

    def _encoded(
        self, pieces: Iterator[str], mark: str, salt: str, limit: PromptLimit | None, abandoned: Callable[[], bool]
    ) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if abandoned():
                raise AbandonedError("the request was cancelled")
            control = self._ids.get(piece)
            if control is not None:
                ids.append(control)
                continue
            text = piece.replace(mark, "")
            # By salt, since what is known already shows in the time that it takes.
            ids += self._kept(text, salt) if len(piece) >= KEPT_PIECE else self._plain_ids(text)
            if limit is not None:
                limit.check(len(ids), more=True)
        return ids

    def _plain_ids(self, text: str, salt: str = "") -> array[int]:
        return array("q", self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _render(self, request: ChatRequest, mark: str) -> str:
        messages = self._system_first(request.messages)
        tools = [self._tool(tool, mark) for tool in request.tools] if request.tool_choice != "none" else []
        variables, thinks = self._options.read(request)
        variables = {name: self._typed_deep(value, mark) for name, value in variables.items()}
        entries = [self._message(message, mark) for message in messages]
        if request.continue_final_message:
            if not request.messages[-1].text:
                what = "continue_final_message: the last message has no text that could go on"
                raise RequestError(what, hint="leave it out", param="continue_final_message")
            return self._continued(entries, tools, variables, mark)
        rendered = self._apply(entries, tools, variables, opens=request.add_generation_prompt)
        if thinks is False and rendered[-64:].rstrip().endswith("<think>"):
            # A template that opens the thought whatever it is told: closed at once, as templates with a switch do it.
            return rendered.rstrip() + NO_THOUGHT
        return rendered

    def _continued(self, entries: list[JsonObject], tools: list[JsonObject], variables: JsonObject, mark: str) -> str:
        """Return the prompt up to the end of the last message's text, whatever the template writes behind it."""
        last, end = entries[-1], 2 * mark
        if isinstance(last["content"], str):
            last["content"] += end
        else:
            last["content"].append({"type": "text", "text": end})
        rendered, found, _ = self._apply(entries, tools, variables, opens=False).rpartition(end)
        if not found:
            what = "the model's chat template leaves out the message that is to be continued"
            raise RequestError(what, param="continue_final_message")
        return rendered

    def _apply(
        self, messages: list[JsonObject], tools: list[JsonObject], variables: JsonObject, *, opens: bool = True
    ) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools or None, tokenize=False, add_generation_prompt=opens, **variables
                )
            )
        except Exception as exc:
            raise RequestError(f"the chat template refuses the messages: {first_line(exc)}", param="messages") from exc

    def _system_first(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages with all system messages joined into one, for a template that would drop later ones."""
        if not any(message.role == "system" for message in messages[1:]) or not self._loses_later_system():
            return messages
        system = [message for message in messages if message.role == "system"]
        parts = list(system[0].parts)
        for message in system[1:]:
            parts += [TextPart("\n\n"), *message.parts]
        others = (message for message in messages if message.role != "system")
        return [replace(system[0], parts=tuple(parts)), *others]

    def _loses_later_system(self) -> bool:
        if self._drops_later_system is None:
            messages = [{"role": "user", "content": "a"}, {"role": "system", "content": PROBE}]
            try:
                self._drops_later_system = PROBE not in self._apply([*messages, messages[0]], [], {})
            except RequestError:
                self._drops_later_system = True
        return self._drops_later_system

    def _pieces(self, rendered: str) -> Iterator[str]:
        """Yield each control token of the rendered prompt, and the text between them in pieces of bounded length."""
        start = scanned = 0
        while scanned < len(rendered):
            # In windows: one search through many megabytes would keep every other thread waiting.
            control = self._controls.search(rendered, scanned, scanned + PIECE + self._overlap)
            if control is not None:
                yield from _words(rendered, start, control.start())
                yield control[0]
                start = scanned = control.end()
            else:
                scanned += PIECE
        yield from _words(rendered, start, len(rendered))

    def _typed(self, text: str, mark: str) -> str:
        if any(first in text for first in self._firsts):
            for token in self._longest_first:
                text = text.replace(token, token[:1] + mark + token[1:])
        return text

    def _message(self, message: Message, mark: str) -> JsonObject:
        entry: JsonObject = {"role": message.role, "content": self._typed(message.text, mark)}
        if message.pictures:
            entry["content"] = [
                {"type": _kind(part)} if not isinstance(part, TextPart) else {"type": "text", "text": t}
                for part, t in self._typed_parts(message.parts, mark)
            ]
        if message.reasoning and self._splits_thoughts:
            entry["reasoning_content"] = self._typed(message.reasoning, mark)
        elif (
            message.role == "assistant"
            and self._splits_thoughts
            and not message.pictures
            and "</think>" in message.text
        ):
            # The template would look for the markers that are no longer there; this is how it reads them.
            thought, content = message.text.split("</think>")[0], message.text.split("</think>")[-1]
            entry["reasoning_content"] = self._typed(thought.rstrip("\n").split("<think>")[-1].lstrip("\n"), mark)
            entry["content"] = self._typed(content.lstrip("\n"), mark)
        if message.tool_calls:
            entry["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": self._typed(call.name, mark), "arguments": self._arguments(call, mark)},
                }
                for call in message.tool_calls
            ]
        return entry

    def _arguments(self, call: ToolCall, mark: str) -> object:
        """Return a call's arguments as the template takes them: in the XML form it goes through them one by one."""
        if self._xml_calls:
            try:
                arguments = json.loads(call.arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                what = f"the arguments of the call {call.id or call.name} are not a JSON object"
                raise RequestError(what, hint="send back what the model called with", param="messages")
            return self._typed_deep(arguments, mark)
        return self._typed(call.arguments, mark)

    def _typed_parts(self, parts: Sequence[Part], mark: str) -> list[tuple[Part, str]]:
        """Return (part, its text); adjacent text parts are joined first, since a typed marker may span two of them."""
        joined: list[Part] = []
        for part in parts:
            last = joined[-1] if joined else None
            if isinstance(part, TextPart) and isinstance(last, TextPart):
                joined[-1] = TextPart(last.text + part.text)
            else:
                joined.append(part)
        return [(part, self._typed(part.text, mark) if isinstance(part, TextPart) else "") for part in joined]

    def _tool(self, tool: Tool, mark: str) -> JsonObject:
        function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
        return {"type": "function", "function": self._typed_deep(function, mark)}

    def _typed_deep(self, value: object, mark: str) -> object:
        if isinstance(value, str):
            return self._typed(value, mark)
        if isinstance(value, dict):
            return {self._typed(str(key), mark): self._typed_deep(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._typed_deep(item, mark) for item in value]
        return value


def _kind(part: Part) -> str:
    return "video" if isinstance(part, VideoPart) else "image"


def _with_times(rendered: str, request: ChatRequest) -> str:
    """Return the prompt with a placeholder, behind its time, for every two frames of each video, as Qwen3-VL has it.

    Raises:
        RequestError: the chat template does not render every video.
    """
    videos = request.videos
    if not videos:
        return rendered
    texts = rendered.split(VIDEO)
    if len(texts) != len(videos) + 1:
        what = f"the model's chat template renders only {len(texts) - 1} of {len(videos)} videos"
        raise RequestError(what, hint="put videos into user messages", param="messages")
    shown = ["".join(f"<{at:.1f} seconds>{VIDEO}" for at in times_of_pairs(video.times)) for video in videos]
    return "".join([texts[0], *(part + text for part, text in zip(shown, texts[1:], strict=True))])


def times_of_pairs(times: Sequence[float]) -> list[float]:
    """Return the time of every two frames, the middle between theirs; a last one alone stands for both."""
    return [(times[at] + times[min(at + 1, len(times) - 1)]) / 2 for at in range(0, len(times), 2)]


def _texts(request: ChatRequest) -> Iterator[str]:
    """Yield every text of a request: messages, tool calls, tools and variables of the template; or a bare prompt."""
    if isinstance(request.prompt, str):
        yield request.prompt
        return
    if request.chat_template_kwargs:
        yield json.dumps(dict(request.chat_template_kwargs), ensure_ascii=False, default=str)
    for message in request.messages:
        yield message.reasoning
        for part in message.parts:
            if isinstance(part, TextPart):
                yield part.text
        for call in message.tool_calls:
            yield call.name
            yield call.arguments
    if request.tool_choice != "none":
        for tool in request.tools:
            yield tool.name
            yield tool.description
            yield json.dumps(dict(tool.parameters), ensure_ascii=False)


def _words(text: str, start: int, end: int) -> Iterator[str]:
    """Yield text[start:end] in pieces of at most PIECE characters, cut where this does not change the tokens.

    That is before a space that follows another character: behind KEPT_PIECE characters or soon after, so that texts
    with the same beginning have the same pieces. A single word beyond PIECE is cut too, but not within a composed
    character.
    """
    while end - start > KEPT_PIECE:
        stop = min(end, start + PIECE)
        cut = next((at for at in _spaces(text, start + KEPT_PIECE, stop) if not text[at - 1].isspace()), None)
        if cut is None:
            if stop == end:
                break
            cut = next((at for at in range(stop, stop - 64, -1) if not unicodedata.combining(text[at])), stop)
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:end]


def _spaces(text: str, start: int, end: int) -> Iterator[int]:
    at = text.find(" ", start, end)
    while at >= 0:
        yield at
        at = text.find(" ", at + 1, end)
