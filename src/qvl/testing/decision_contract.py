"""The part of the contract of backends that is about questions with a fixed set of answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import ClassVar

import pytest

from qvl.backends.base import Backend
from qvl.decisions.ask_labels import LabelAsker
from qvl.decisions.questions import ChoiceQuestion as Choice
from qvl.testing.asking import ask, in_loop, refused
from qvl.types import TextPart


class DecisionContract:
    """A base class of BackendContract."""

    patience: ClassVar[float] = 120.0
    loop: ClassVar[asyncio.AbstractEventLoop]

    @in_loop
    async def test_probabilities_of_labels_are_whole_or_not_claimed(self, backend: Backend, question: str) -> None:
        asked = Choice(question, ["red", "red wine", "blue"])
        request = ask(question)
        shown = replace(request.messages[0], parts=(*request.messages[0].parts, TextPart("")))
        asker = LabelAsker(
            asked,
            request.replace(messages=(shown,)),
            len(request.messages[0].parts),
            backend.capabilities,
            await backend.token_table(),
            await backend.own_decisions(),
            backend.generate,
        )
        shares, best, mass = await asker.ask()
        if best is None:
            # A model that would say something else: told, not hidden behind equal parts.
            assert shares is None
            assert asker.notes
            return
        assert asker.usage.prompt_tokens > 0
        assert asker.method in ("decisions", "logits", "top_logprobs", "choice")
        if asker.method == "choice":
            assert (shares, mass) == (None, None)
            assert asker.notes
            return
        assert shares is not None
        assert sum(shares) == pytest.approx(1)
        assert shares[best] == max(shares)
        if asker.method == "decisions":
            assert mass is None
            return
        assert mass is not None
        assert 0 < mass <= 1 + 1e-3

    @in_loop
    async def test_an_answer_goes_on_behind_its_beginning_or_that_is_refused(
        self, backend: Backend, question: str
    ) -> None:
        table = await backend.token_table()
        begun = tuple(token for token, _ in table.beginnings(b"red")[:1]) if table is not None else (1,)
        request = ask(question, max_tokens=2).replace(prefill=begun)
        if "prefill" not in backend.capabilities.fields:
            assert table is None
            await refused(backend, request, "prefill")
            return
        plain = await backend.generate(request.replace(prefill=()))
        assert (await backend.generate(request)).usage.prompt_tokens == plain.usage.prompt_tokens + 1
