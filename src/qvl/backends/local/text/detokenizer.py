"""Turns tokens into Chunks: bytes to whole characters, stop strings, and separate reasoning and tool calls."""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from qvl.backends.endless import RunWatch, endless, longest_run
from qvl.backends.local.text.thought_tokens import THINK, THINK_END, ThoughtTokens
from qvl.backends.local.text.tool_call import CallReader, ObjectScanner, parse_call
from qvl.backends.local.text.xml_call import OPENS, XmlCallReader, xml_end
from qvl.backends.token_table import TokenTable
from qvl.types import Chunk, TokenLogprob, ToolCallDelta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qvl.backends.local.model.sampler import Sampled
    from qvl.backends.local.scheduling.token_rules import TokenScore
    from qvl.types import ChatRequest, FinishReason, Tool

CALL, CALL_END = "<tool_call>", "</tool_call>"
# Between the calls of one block and behind them: commas, the end of a list or of a code fence, a brace too many.
_SEPARATORS: Final = " \t\r\n,]}`"


class Vocabulary:
    """The bytes of each token (byte-level BPE, as in all Qwen tokenizers); special tokens have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters()
        self._known: dict[int, bytes] = {
            index: b"" if token.special else token.content.encode()
            for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._table: TokenTable | None = None
        self._names = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token; of a control token none, unless `special`."""
        if special and token in self._names:
            return str(self._names[token]).encode()
        known = self._known.get(token)
        if known is None:
            # Rows of the embedding beyond the tokenizer stand for nothing.
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            known = self._known[token] = bytes(self._letters[c] for c in letters if c in self._letters)
        return known

    def table(self, ends: Sequence[int]) -> TokenTable:
        """Return the tokens by their bytes; `ends` are those that end an answer. Made once, slowly."""
        if self._table is None:
            tokens = [(token, self.bytes(token)) for token in range(len(self._tokenizer))]
            self._table = TokenTable(tokens, [(token, self._names.get(token, "")) for token in ends])
        return self._table

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with control tokens as they are written."""
        return b"".join([self.bytes(token, special=True) for token in tokens]).decode("utf-8", errors="replace")

    def scored(self, token: int, score: TokenScore) -> TokenLogprob:
        """Return a prompt's token with its score."""
        known = self.logprob(token, score.logprob)
        top = tuple(
            replace(self.logprob(other, value), id=other, rank=place)
            for place, (other, value) in enumerate(score.top, start=1)
        )
        return replace(known, id=token, rank=score.rank, top=top)

    def logprob(self, token: int, value: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprob:
        data = self.bytes(token)
        text = data.decode("utf-8", errors="replace") or self._names.get(token, "")
        return TokenLogprob(text, value, data, tuple(self.logprob(other, v) for other, v in top))


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter in GPT-2's table, which maps every byte to a visible letter."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return table | {chr(256 + offset): byte for offset, byte in enumerate(hidden)}


@dataclass(slots=True)
class Detokenizer:
    """Turns the tokens of one sequence into Chunks.

    Args:
        vocabulary: bytes of tokens.
        index: the choice's index.
        stop: strings that end the answer; they are not part of it.
        reasoning: True if the prompt has opened a `<think>` already.
        parse_tools: True if `<tool_call>` blocks are tool calls, not text.
        tools: what may be called.
        want_logprobs: True if Chunks list tokens with logprobs.
        free: True if the answer may begin with `<think>`: it has no grammar.
        only_call: True if the answer is the JSON of one tool call, without markup.
        longest_run: most repetitions in a row before the answer fails; 0 for no limit.
        min_tokens: stop strings among so many first tokens do not end the answer.
        with_stop: True if the stop string or token that ends the answer is a part of it.
        special: True if control tokens are shown.
        want_ids: True if Chunks list their token ids.
    """

    vocabulary: Vocabulary
    index: int = 0
    stop: tuple[str, ...] = ()
    reasoning: bool = False
    parse_tools: bool = False
    tools: tuple[Tool, ...] = ()
    want_logprobs: bool = False
    free: bool = True
    only_call: bool = False
    longest_run: int = 0
    min_tokens: int = 0
    with_stop: bool = False
    special: bool = False
    want_ids: bool = False
    num_calls: int = 0
    stopped: bool = False
    stop_string: str | None = None  # the one that ended the answer
    _decoder: codecs.IncrementalDecoder = field(init=False)
    _pending: str = ""  # behind the stop filter: may become a stop string
    _splitter: Splitter = field(init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _ids: list[int] = field(default_factory=list)
    _count: int = 0
    _call: CallReader | XmlCallReader | None = None  # the call that is being written
    _watch: RunWatch = field(init=False)
    _thought: ThoughtTokens = field(init=False)

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._watch = RunWatch(self.longest_run)
        self._splitter = Splitter(self.reasoning, self.parse_tools, self.free, only_call=self.only_call)
        self._thought = ThoughtTokens(opened=self.reasoning, free=self.free)

    @classmethod
    def of(
        cls, request: ChatRequest, vocabulary: Vocabulary, index: int, *, reasoning: bool, marked_calls: bool
    ) -> Detokenizer:
        """Return the detokenizer of choice `index`; `marked_calls`: True if a forced call has `<tool_call>` markup."""
        form, forced = request.response_format, bool(request.forced_tools)
        calls = bool(request.tools) and request.tool_choice != "none" and (marked_calls or not forced)
        return cls(
            vocabulary,
            index,
            request.sampling.stop,
            reasoning=reasoning,
            parse_tools=calls,
            tools=request.tools,
            want_logprobs=request.sampling.wants_logprobs,
            free=form.kind == "text" and not forced,
            only_call=forced and not marked_calls,
            longest_run=longest_run(request),
            min_tokens=request.sampling.min_tokens,
            with_stop=request.sampling.include_stop_str_in_output,
            special=not request.sampling.skip_special_tokens,
            want_ids=request.sampling.return_token_ids,
        )

    @property
    def in_reasoning(self) -> bool:
        return self._splitter.state == "reasoning"

    @property
    def reasoning_tokens(self) -> int:
        """The number of tokens of the reasoning so far, without those of its marks."""
        return self._thought.count

    def push(self, sampled: Sampled) -> Chunk | None:
        """Add a token and return the Chunk it completes, if any; sets `stopped` after a stop string.

        Raises:
            BackendResponseError: an answer under a grammar repeats itself endlessly.
        """
        self._thought.push(self.vocabulary.bytes(sampled.token, special=self.special))
        return self._push(sampled)

    def _push(self, sampled: Sampled) -> Chunk | None:
        if self.want_logprobs:
            self._logprobs.append(self.vocabulary.logprob(sampled.token, sampled.logprob, sampled.top))
        if self.want_ids:
            self._ids.append(sampled.token)
        self._count += 1
        text = self._decoder.decode(self.vocabulary.bytes(sampled.token, special=self.special))
        if not text:
            return None
        if self.longest_run and not self.in_reasoning and (repeated := self._watch.feed(text)):
            raise endless(repeated, self.longest_run)
        return self._chunk(self._until_stop(text))

    def end(self, sampled: Sampled) -> Chunk | None:
        """Add the EOS or stop token that ends the answer, which is a part of it only `with_stop`; returns as `push`."""
        if self.with_stop:
            return self._push(sampled)
        if self.want_ids:
            self._ids.append(sampled.token)
        return None

    def finish(self, reason: FinishReason) -> Chunk:
        """Return the last chunk of the choice, with all text that was withheld."""
        text = "" if self.stopped else self._until_stop(self._decoder.decode(b"", True))
        if not self.stopped:
            text, self._pending = text + self._pending, ""
        chunk = self._chunk(text, last=True, cut_off=reason == "length") or Chunk(index=self.index)
        if reason == "stop" and self.num_calls:
            reason = "tool_calls"
        return replace(chunk, finish_reason=reason, stop_string=self.stop_string if reason == "stop" else None)

    def _until_stop(self, text: str) -> str:
        """Return the text that can be sent: up to anything that is, or may become, a stop string."""
        if not self.stop:
            return text
        text = self._pending + text
        if self._count <= self.min_tokens:
            self._pending = ""
            return text
        matches = [(start, word) for word in self.stop if (start := text.find(word)) >= 0]
        if matches:
            self.stopped, self._pending = True, ""
            start, word = min(matches)
            self.stop_string = word
            if self.with_stop:
                start += len(word)
            # What waits in the decoder is a part of what came behind the stop string.
            self._drop_logprobs(len(text[start:].encode()) + len(self._decoder.getstate()[0]))
            return text[:start]
        keep = max((_overlap(text, word) for word in self.stop), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _drop_logprobs(self, count: int) -> None:
        """Drop the logprobs of tokens wholly within the last `count` bytes, which are not part of the answer."""
        while self._logprobs and count >= (size := len(self._logprobs[-1].bytes)):
            count -= size
            self._logprobs.pop()

    def _chunk(self, text: str, *, last: bool = False, cut_off: bool = False) -> Chunk | None:
        content, reasoning, blocks = self._splitter.push(text, last=last)
        deltas: list[ToolCallDelta] = []
        for block in blocks:
            content += self._read(block, deltas, whole=True, last=last)
            self._call = None
        if self._splitter.state == "call":
            content += self._read(self._splitter.open_call, deltas, whole=False, last=last and not cut_off)
        if not (content or reasoning or deltas or (last and (self._logprobs or self._ids))):
            return None
        logprobs, self._logprobs = tuple(self._logprobs), []
        ids, self._ids = tuple(self._ids), []
        return Chunk(content, self.index, reasoning, tuple(deltas), logprobs, token_ids=ids)

    def _read(self, block: str, deltas: list[ToolCallDelta], *, whole: bool, last: bool) -> str:
        """Add the new pieces of the tool call in `block` to `deltas`; return `block` as text if it is not a call."""
        call = self._call = self._call or self._reader(block)
        if call is None:
            return ""
        started = call.started
        arguments = call.feed(block, whole=whole)
        if call.started and not started:
            deltas.append(ToolCallDelta(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", call.name, arguments))
            self.num_calls += 1
        elif arguments:
            deltas.append(ToolCallDelta(self.num_calls - 1, arguments=arguments))
        if call.started or not (whole or last):
            return ""
        return block if self.only_call else f"{CALL}{block}" + (CALL_END if whole and not last else "")

    def _reader(self, block: str) -> CallReader | XmlCallReader | None:
        """Return what reads a call of the form that `block` begins with; None while that is open."""
        begins = block.lstrip()
        if begins.startswith(OPENS):
            return XmlCallReader(self.tools)
        return None if OPENS.startswith(begins) else CallReader()


class Splitter:
    """Splits streamed text into content, reasoning (`<think>`) and tool calls.

    `state` is start, reasoning, content or call. White space around markup is dropped. A call ends with its JSON
    object, whatever its strings contain; one in the XML form with its function; anything else with `</tool_call>`. A
    block may hold several objects.
    """

    def __init__(self, reasoning: bool, parse_tools: bool, free: bool, *, only_call: bool = False) -> None:
        self.state = "call" if only_call else "reasoning" if reasoning else "start" if free else "content"
        self._tools = parse_tools
        self._buffer = ""
        self._object = ObjectScanner()
        self._fresh = reasoning  # white space behind markup is dropped

    def push(self, text: str, *, last: bool = False) -> tuple[str, str, list[str]]:
        """Return the new (content, reasoning, finished tool calls) that later text cannot change; `last`: all text."""
        self._buffer += text
        content, reasoning, calls = "", "", []
        while True:
            if self.state == "start":
                lead = self._buffer.lstrip()
                if lead.startswith(THINK):
                    self._enter("reasoning", lead[len(THINK) :])
                elif last or not THINK.startswith(lead):
                    self.state, self._fresh = "content", False
                else:
                    break
            elif self.state == "reasoning":
                piece, closed = self._take(THINK_END, last)
                reasoning += piece
                if not closed:
                    break
                self._enter("content", self._buffer)
            elif self.state == "call":
                body, rest, then = self._one_call(last)
                if not then:
                    break
                calls.append(body)
                self._enter(then, rest)
            elif not self._tools:
                piece, _ = self._take(None, last)
                content += piece
                break
            else:
                piece, opened = self._take(CALL, last)
                content += piece
                if not opened:
                    break
                self._enter("call", self._buffer)
        return content, reasoning, calls

    @property
    def open_call(self) -> str:
        """The text so far of the unfinished tool call; defined only while `state` is "call"."""
        return self._buffer

    def _one_call(self, last: bool) -> tuple[str, str, str]:
        """Return (call, text behind it, state of that text: content or call); ("", "", "") until a call has ended."""
        self._object.feed(self._buffer)
        if self._object.end is not None:
            body, rest = self._buffer[: self._object.end], self._buffer[self._object.end :]
            behind = rest.lstrip(_SEPARATORS)
            if behind.startswith(CALL_END):
                return body, behind.removeprefix(CALL_END), "content"
            if CALL_END.startswith(behind):
                return (body, "", "content") if last else ("", "", "")
            return (body, behind, "call") if behind.startswith("{") else (body, rest.lstrip(), "content")
        if self._buffer.lstrip().startswith(OPENS):
            end = xml_end(self._buffer)
            if end is not None:
                return self._buffer[: end[0]], self._buffer[end[1] :], "content"
            if not last:
                return "", "", ""
        if self._object.other or last:
            body, closed, rest = self._buffer.partition(CALL_END)
            return body, rest, "content" if closed else ""
        return "", "", ""

    def _enter(self, state: str, rest: str) -> None:
        self.state, self._buffer, self._fresh = state, rest, True
        self._object = ObjectScanner()

    def _take(self, mark: str | None, last: bool) -> tuple[str, bool]:
        """Return (text up to `mark`, True), or (text that cannot be part of `mark`, False) if it is not found."""
        if self._fresh:
            self._buffer = self._buffer.lstrip()
            self._fresh = not self._buffer
        text = self._buffer
        if mark is None:
            self._buffer = ""
            return text, False
        start = text.find(mark)
        if start >= 0:
            self._buffer = text[start + len(mark) :]
            return text[:start].rstrip(), True
        if last:
            self._buffer = ""
            return text, False
        keep = _overlap(text, mark)
        stem = text[: len(text) - keep]
        keep += len(stem) - len(stem.rstrip())
        self._buffer = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `word`."""
    for size in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:size]):
            return size
    return 0


__all__: Sequence[str] = ["Detokenizer", "Splitter", "Vocabulary", "parse_call"]
