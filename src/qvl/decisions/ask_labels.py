"""Asks a backend for the probability of each label, by the best of the ways it has."""

from __future__ import annotations

import math
import string
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.decisions.questions import (
    APART,
    ChoiceQuestion,
    Label,
    Predicate,
    Question,
    options_text,
    orders,
    question_form,
)
from qvl.decisions.read_labels import probability, read_top, read_tree, together
from qvl.errors import BackendResponseError, QvlError, RefusalError
from qvl.types import ChatRequest, ResponseFormat, Result, SamplingParams, TextPart, TokenLogprob, Usage

if TYPE_CHECKING:
    from qvl.backends.base import Capabilities, OwnDecisions
    from qvl.backends.token_table import TokenTable

Send: TypeAlias = "Callable[[ChatRequest], Awaitable[Result]]"
# Most ids that one request may name in logprob_token_ids.
IDS: Final = 128
LETTERS: Final = string.ascii_uppercase
MIN_ANSWER: Final = 64
MAX_ANSWER: Final = 1024


class _NoLogprobsError(BackendResponseError):
    """A backend that is believed to tell probabilities told none."""


@dataclass(slots=True)
class LabelAsker:
    """Asks one question in each of its orders and averages what comes.

    Args:
        question: the question.
        request: its request, whose last text part lists the options; `send` sends it.
        parts: how many parts before that one are the question's instructions.
        have, table, own: what the backend can do, its tokens if it tells them, and its own decisions if it has some.
    """

    question: Question
    request: ChatRequest
    parts: int
    have: Capabilities
    table: TokenTable | None
    own: OwnDecisions | None
    send: Send
    method: str = ""
    notes: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    async def ask(self) -> tuple[list[float] | None, int | None, float | None]:
        """Return (the probability of each of the question's labels, the likeliest label, label mass).

        Probabilities and mass are None from a backend that tells none. The label is None, and `notes` say why, if the
        model would say none of the labels: then there are no probabilities either.

        Raises:
            BackendResponseError: what the backend tells are no probabilities.
        """
        labels = self.question.labels
        if self.own is not None and (self.own.images or not self.request.pictures):
            try:
                return await self._own(self.own)
            except RefusalError:
                raise
            except QvlError as exc:
                self.notes.append(f"the endpoint's own decisions failed, so it was asked otherwise: {exc.message}")
        listed = min(self.have.top_logprobs, len(LETTERS)) if self.have.logprobs else 0
        if self.table is not None and self.have.logprobs:
            self.method = "logits" if "logprob_token_ids" in self.have.sampling else "top_logprobs"
            read = self._tree
        elif len(labels) <= listed:
            self.method = "top_logprobs"
            read = self._top
        else:
            known = f"only the {listed} likeliest tokens, and there are {len(labels)} options" if listed else "none"
            return await self._alone(f"this backend tells {known}")
        # The first alone, so that what the orders share is computed once, where only whole prompts are kept.
        ways = orders(self.question)
        alone = 0 if self.method == "logits" else 1
        try:
            first = [await read(way) for way in ways[:alone]]
            found = first + await together(read(way) for way in ways[alone:])
        except _NoLogprobsError as exc:
            if self.method == "logits":
                raise
            return await self._alone(exc.message)
        place = {label.text: index for index, label in enumerate(labels)}
        total = [0.0] * len(labels)
        masses = [math.fsum(shares) for shares in found]
        for way, shares, mass in zip(ways, found, masses, strict=True):
            for label, share in zip(way, shares, strict=True):
                total[place[label.text]] += share / mass if mass > 0 else 0.0
        whole = math.fsum(total)
        if silent := sum(not mass > 0 for mass in masses):
            where = f" in {silent} of {len(ways)} orders of the options" if whole > 0 else ""
            self.notes.append(f"none of the possible answers is among what the model would say{where}")
        if not whole > 0:
            return None, None, 0.0
        probabilities = [share / whole for share in total]
        return probabilities, probabilities.index(max(probabilities)), math.fsum(masses) / len(masses)

    @property
    def usage(self) -> Usage:
        """The tokens of all requests so far."""
        return Usage.sum(self.usages)

    async def _own(self, own: OwnDecisions) -> tuple[list[float], int, None]:
        """Return what the backend itself says, its options in every order too."""
        *before, last = self.request.messages
        split = len(last.parts) - 1 - self.parts
        shown = last.parts[:split]
        if shown and isinstance(shown[-1], TextPart) and shown[-1].text.endswith(APART):
            # The endpoint sets its questions apart itself.
            text = shown[-1].text.removesuffix(APART)
            shown = (*shown[:-1], TextPart(text)) if text else shown[:-1]
        about = self.request.replace(messages=(*before, replace(last, parts=shown)))
        ways = orders(self.question) if isinstance(self.question, ChoiceQuestion) else [self.question.labels]
        asked = [question_form(self.question, last.parts[split:-1], way) for way in ways]
        told, usage = await own.ask(about, asked)
        self.usages.append(usage)
        self.method = "decisions"
        answered = [shares for shares in told if shares is not None]
        if not answered:
            raise RefusalError("the endpoint declined to answer")
        values = [label.value for label in self.question.labels]
        total = [math.fsum(shares[value] for shares in answered) for value in values]
        whole = math.fsum(total)
        if not whole > 0:
            raise BackendResponseError("the endpoint's probabilities add up to nothing")
        probabilities = [share / whole for share in total]
        return probabilities, probabilities.index(max(probabilities)), None

    async def _tree(self, way: Sequence[Label]) -> list[float]:
        request = self._shown(way)
        table = self.table
        assert table is not None

        async def ask(prefill: tuple[int, ...], tokens: Sequence[int]) -> Mapping[int, float]:
            behind = request.replace(prefill=prefill)
            # Without a list of tokens, of the likeliest.
            pieces: list[Sequence[int]] = [()]
            if self.method == "logits":
                pieces = [tokens[start : start + IDS] for start in range(0, len(tokens), IDS)]
            tops = await together(self._first(behind, tuple(piece)) for piece in pieces)
            if not any(pieces) and not self.notes:
                self.notes.append(f"a token beyond the {self.have.top_logprobs} likeliest counts as impossible")
            found: dict[int, float] = {}
            for item in (item for top in tops for item in top):
                wanted = [token for token in table.ids(item.token, item.bytes) if token in tokens]
                found |= {token: probability(item.logprob) for token in wanted[:1]}
            return found

        return await read_tree([label.text for label in way], table, ask)

    async def _top(self, way: Sequence[Label]) -> list[float]:
        texts = [label.text for label in way]
        if isinstance(self.question, Predicate):
            shares = read_top(texts, await self._first(self._shown(way)))
        else:
            # Letters, each of which is one token: behind a token that two options begin with nothing could be asked.
            letters = LETTERS[: len(way)]
            shares = read_top(letters, await self._first(self._shown(way, letters)))
            if not self.notes:
                self.notes.append("the options were asked for by letters: the endpoint tells no more than first tokens")
        return shares

    async def _first(self, request: ChatRequest, tokens: tuple[int, ...] = ()) -> Sequence[TokenLogprob]:
        """Return the logprobs at the first token of the answer: of `tokens`, else of the likeliest."""
        sampling = SamplingParams(
            max_tokens=1,
            logprobs=0 if tokens else self.have.top_logprobs,
            logprob_token_ids=tokens,
            ignore_eos=self.table is not None,
        )
        result = await self.send(request.replace(sampling=sampling))
        self.usages.append(result.usage)
        if not result.logprobs:
            raise _NoLogprobsError("the answer has no logprobs", hint="another endpoint, or a local model")
        return result.logprobs[0].top

    async def _alone(self, why: str) -> tuple[None, int | None, None]:
        """Return the label that the model answers with, without probabilities, and note why."""
        self.method = "choice"
        self.notes.append(f"the answer stands alone, without probabilities: {why}")
        return None, await self._chosen(self.question.labels), None

    async def _chosen(self, labels: Sequence[Label]) -> int | None:
        """Return the label that the model answers with; None, and a note, if it is none of them."""
        texts = [label.text for label in labels]
        # No token is less than a byte.
        most = min(max(MIN_ANSWER, *(len(text.encode()) for text in texts)), MAX_ANSWER)
        request = self._shown(labels).replace(sampling=SamplingParams(max_tokens=most))
        if "choice" in self.have.response_formats:
            request = request.replace(response_format=ResponseFormat("choice", choices=tuple(texts)))
        result = await self.send(request)
        self.usages.append(result.usage)
        said = result.text.strip()
        # As it is spelt first: two labels may differ by case alone, or by what a model may write around an answer.
        for fold in (str, str.casefold, _bare, lambda text: _bare(text).casefold()):
            fits = [index for index, text in enumerate(texts) if fold(text) == fold(said)]
            if len(fits) == 1:
                return fits[0]
        self.notes.append(f"the model answered {said[:80]!r}, which is none of the possible answers")
        return None

    def _shown(self, way: Sequence[Label], marks: Sequence[str] = ()) -> ChatRequest:
        """Return the request with the options in the order `way`."""
        *before, last = self.request.messages
        parts = (*last.parts[:-1], TextPart(options_text(self.question, way, marks)))
        return self.request.replace(messages=(*before, replace(last, parts=parts)))


def _bare(text: str) -> str:
    """Return a text without full stops, quotation marks and emphasis around it."""
    return text.strip(".\"'`* ")
