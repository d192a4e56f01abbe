"""Token masks for structured outputs: JSON schema, JSON, regex, choice, tool calls (llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, Self

import numpy as np

from qvl.backends.grammar_schema import call_schema, compiler_reason, enforceable
from qvl.backends.local.model.device import to_device
from qvl.backends.local.text.xml_call import writes_xml, xml_rules
from qvl.backends.schema_bounds import check_format
from qvl.errors import MissingDependencyError, RequestError, first_line
from qvl.suggest import install_line

if TYPE_CHECKING:
    import torch
    from llguidance import LLTokenizer
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from qvl.types import ChatRequest, Tool

# What json.dumps writes: no room for endless white space, and two runs of one answer compare equal as text.
SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Tokens that may follow a text, of which is asked whether they change its spelling.
TRIED: Final = 8


class Matcher(Protocol):
    """llguidance's LLMatcher: the state of one answer in its grammar."""

    def compute_ff_bytes(self) -> bytes: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def consume_token(self, token: int) -> bool: ...
    def deep_copy(self) -> Self: ...
    def get_error(self) -> str: ...
    def is_error(self) -> bool: ...
    def is_stopped(self) -> bool: ...


def consume(matcher: Matcher, token: int) -> None:
    """Advance `matcher` by a token.

    Raises:
        RequestError: the grammar exceeds llguidance's limits at this token.
    """
    try:
        # Beyond its limits a matcher calls itself stopped too, which is not the end of a good answer.
        if not matcher.is_error() and matcher.consume_token(token) and not matcher.is_error():
            return
        reason = matcher.get_error()
    except Exception as exc:  # noqa: BLE001 - the fault of one grammar
        reason = first_line(exc)
    raise RequestError(
        f"the schema or pattern is too complex to be enforced: {first_line(reason)}",
        hint="simplify it",
        code="invalid_schema",
    )


class Grammars:
    """Compiles the grammars of requests, all over one tokenizer table that is built on first use.

    Args:
        tokenizer: transformers' fast tokenizer.
        vocab_size: columns of the logits, which may exceed the tokenizer's number of tokens.
        eos_token_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._table: LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, request: ChatRequest) -> Matcher | None:
        """Return a new matcher for the request's response format or forced tools, or None if its answer is free text.

        Raises:
            RequestError: the schema, pattern or choices cannot be compiled.
        """
        grammar, param = self._grammar(request)
        if grammar is None:
            return None
        matcher, error = self._compile(grammar)
        if error:
            raise _refused(self._fault_of_a_tool(request.forced_tools) or compiler_reason(error), param)
        return matcher

    def _compile(self, grammar: str) -> tuple[Matcher | None, str]:
        """Return (matcher or None, error message of the compiler or "")."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokens(), grammar, log_level=0)
            return matcher, str(matcher.get_error()) if matcher.is_error() else ""
        except BaseException as exc:
            # A panic of the compiler is no Exception; it is this request's, and nobody else's.
            if isinstance(exc, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            return None, str(exc) or type(exc).__name__

    def _fault_of_a_tool(self, tools: Sequence[Tool]) -> str:
        """Return the first of `tools` that cannot be compiled with the reason, or "" if each can."""
        from llguidance import LLMatcher

        for tool in tools:
            try:
                grammar = LLMatcher.grammar_from_json_schema(call_schema([tool]), overrides=SPACING)
                error = self._compile(grammar)[1]
            except ValueError as exc:
                error = str(exc)
            if error:
                return f"{tool.name}: {compiler_reason(error)}"
        return ""

    def _grammar(self, request: ChatRequest) -> tuple[str | None, str]:
        try:
            from llguidance import LLMatcher
        except ImportError as exc:
            if request.response_format.kind == "text" and request.tool_choice in ("none", "auto"):
                return None, ""
            raise MissingDependencyError("response_format needs llguidance", hint=install_line("local")) from exc
        if named := request.forced_tools:
            return self._calls(named, request.parallel_tool_calls and request.tool_choice == "required"), "tools"
        form = request.response_format
        check_format(form)
        try:
            if form.kind in ("json_schema", "json_object"):
                schema = {"type": "object"} if form.kind == "json_object" else form.schema
                ready = enforceable(schema, "response_format")
                return LLMatcher.grammar_from_json_schema(ready, overrides=SPACING), "response_format"
            if form.kind == "regex":
                return LLMatcher.grammar_from_regex(form.pattern or ""), "response_format"
            if form.kind == "grammar":
                return lark_of(form.pattern or ""), "response_format"
        except ValueError as exc:
            if isinstance(exc, RequestError):
                raise
            raise _refused(compiler_reason(str(exc)), "response_format") from exc
        if form.kind == "choice":
            return "start: " + " | ".join(json.dumps(choice) for choice in form.choices), "response_format"
        if request.holds_calls:
            markup = self._markup("<tool_call>"), self._markup("</tool_call>")
            return calls_within_text(request, *markup, xml=writes_xml(self._tokenizer)), "tools"
        return None, ""

    def _calls(self, tools: Sequence[Tool], several: bool) -> str:
        """Return a Lark grammar of one tool call, or of several on separate lines, in the form of the model."""
        first, last = self._markup("<tool_call>"), self._markup("</tool_call>")
        more = ' ("\\n" call)*' if several else ""
        body = _body(tools, xml=writes_xml(self._tokenizer))
        return f'start: call{more}\ncall: {first} "\\n" body "\\n" {last}\n{body}'

    def _markup(self, word: str) -> str:
        """Return `word` in Lark syntax: unquoted if it is a single special token, else as a string literal."""
        known = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        return word if word in known else json.dumps(word)

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._table is None:
                from llguidance.hf import from_tokenizer

                self._table = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos or None)
            return self._table

    def forced(self, matcher: Matcher) -> list[int]:
        """Return the tokens of the text that must come next; [] where there is a choice, and at the end of an answer.

        Of the ways to spell it the tokenizer's own is taken, without what may merge with the text behind it.
        """
        try:
            return [] if matcher.is_stopped() else matcher.compute_ff_tokens()
        except Exception:  # noqa: BLE001 - a grammar that fails tells so with its next mask
            return []

    def probable(self, matcher: Matcher) -> tuple[int, ...]:
        """Return how a text that must come next is probably spelt, where it may be spelt otherwise; else ().

        It may merge with what follows it, as a space and a quotation mark with a slash. The tokenizer's own spelling is
        returned if most of what may follow leaves it as it is.
        """
        try:
            text = b"" if matcher.is_stopped() else matcher.compute_ff_bytes()
            if not text:
                return ()
            table, behind = self._tokens(), matcher.deep_copy()
            spelt: list[int] = table.tokenize_bytes(text)
            if not all(behind.consume_token(token) for token in spelt):
                return ()
            following = np.flatnonzero(self._spread(self._allowed([behind])))
            tried = following[:: max(1, len(following) // TRIED)][:TRIED].tolist()
            texts = [text + table.decode_bytes([token]) for token in tried]
        except Exception:  # noqa: BLE001 - as of forced ones
            return ()
        kept = sum(table.tokenize_bytes(whole)[: len(spelt)] == spelt for whole in texts)
        return tuple(spelt) if 2 * kept > len(texts) else ()

    def ahead(self, matcher: Matcher | None, draft: Sequence[int]) -> Iterator[Matcher | None]:
        """Yield `matcher`, and its states behind each token of `draft`; None behind one that it does not allow."""
        yield matcher
        for token in draft:
            try:
                matcher = None if matcher is None else matcher.deep_copy()
                if matcher is not None and not matcher.consume_token(token):
                    matcher = None
            except Exception:  # noqa: BLE001 - the sequence's own matcher tells so when it gets there
                matcher = None
            yield matcher

    def mask(self, matchers: Sequence[Matcher | None], device: torch.device) -> Tensor:
        """Return bool [len(matchers), vocabulary], True where a token is forbidden; a None matcher forbids nothing."""
        import torch

        allowed = self._allowed(matchers)
        if device.type == "cpu":
            return torch.from_numpy(self._spread(~allowed))
        # An eighth of a byte crosses for each token, and one operator spreads it.
        places = 2 ** torch.arange(8, device=device).to(torch.uint8)
        spread = torch.bitwise_and(to_device(allowed, device).unsqueeze(-1), places)
        return (spread == 0).flatten(1)[:, : self._vocab_size]

    def _allowed(self, matchers: Sequence[Matcher | None]) -> NDArray[np.uint8]:
        """Return a bit for each token of each matcher, set where it is allowed."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(len(matchers), self._vocab_size)
        for row, matcher in enumerate(matchers):
            if matcher is None:
                bits[row] = -1
            else:
                try:
                    fill_next_token_bitmask(matcher, bits, row)
                except Exception:  # noqa: BLE001 - whatever this one grammar raises, the others must not feel it
                    bits[row] = 0  # nothing is allowed, so the matcher refuses what is sampled and its request ends
        allowed: NDArray[np.uint8] = bits.view(np.uint8)
        return allowed

    def _spread(self, bits: NDArray[np.uint8]) -> NDArray[np.bool_]:
        # A thirtieth of the time of torch's operators.
        return np.unpackbits(bits, axis=1, count=self._vocab_size, bitorder="little").view(np.bool_)


def _body(tools: Sequence[Tool], *, xml: bool) -> str:
    """Return the rules by which `body` is a call, in the XML form or as JSON."""
    if xml:
        return xml_rules(tools)
    return f"body: %json {json.dumps({**call_schema(tools), 'x-guidance': SPACING})}\n"


def calls_within_text(request: ChatRequest, first: str, last: str, *, xml: bool = False) -> str:
    """Return a Lark grammar of text that may hold calls, those of strict tools with arguments by their schemas.

    `first` and `last` are the markup around a call, in Lark's syntax. Without parallel calls the first one is the end.
    """
    tools = [tool if tool.strict else replace(tool, parameters={"type": "object"}) for tool in request.tools]
    body = _body(tools, xml=xml)
    start = "TEXT? (call TEXT?)*" if request.parallel_tool_calls else "TEXT? call?"
    return (
        f"start: {start}\n"
        "TEXT: /(.|\\n)+/ & ~/(?s:.*)<tool_call>(?s:.*)/\n"
        f'call: {first} "\\n" body "\\n" {last}\n{body}'
    )


def lark_of(grammar: str) -> str:
    """Return a grammar in Lark's syntax, from that or from GBNF (EBNF).

    Raises:
        ValueError: it cannot be read.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as exc:
        raise ValueError(f"invalid grammar: {first_line(exc)}") from exc


def _refused(reason: str, param: str) -> RequestError:
    return RequestError(
        f"{param} cannot be enforced: {reason}",
        hint="correct or simplify the schema or pattern",
        param=param,
        code="invalid_schema",
    )
