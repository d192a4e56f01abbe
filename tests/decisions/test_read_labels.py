"""The probability of a whole label is that of every spelling of it in tokens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence

import pytest

from qvl.backends.token_table import TokenTable
from qvl.decisions.read_labels import MAX_ASKED, read_tree, together
from qvl.errors import RequestError

WORDS = [b"r", b"e", b"d", b"re", b"red", b" ", b" w", b"w", b"i", b"n", b" wine", b"o", b"s", b"rose", b"ro", b"\n"]
END = len(WORDS)
TABLE = TokenTable(enumerate(WORDS), [(END, "<end>")])


class Speller:
    """A model that writes each of `texts` with its probability, in every spelling alike, then ends."""

    def __init__(self, texts: Mapping[bytes, float]) -> None:
        self.paths: dict[tuple[int, ...], float] = {}
        self.asked = 0
        for text, share in texts.items():
            spelt = list(_spellings(text))
            for path in spelt:
                self.paths[(*path, END)] = share / len(spelt)

    async def __call__(self, before: tuple[int, ...], tokens: Sequence[int]) -> Mapping[int, float]:
        self.asked += 1
        whole = self._mass(before)
        return {token: self._mass((*before, token)) / whole for token in tokens}

    def _mass(self, before: tuple[int, ...]) -> float:
        return sum(share for path, share in self.paths.items() if path[: len(before)] == before)


def _spellings(text: bytes) -> list[tuple[int, ...]]:
    if not text:
        return [()]
    return [
        (token, *rest)
        for token, word in enumerate(WORDS)
        if text.startswith(word)
        for rest in _spellings(text[len(word) :])
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(["red", "red wine", "rose"])))
def test_every_spelling_counts_and_a_beginning_is_not_the_whole(order: Sequence[str]) -> None:
    model = Speller({b"red": 0.3, b"red wine": 0.4, b"rose": 0.1, b"wood": 0.2})
    found = dict(zip(order, asyncio.run(read_tree(order, TABLE, model)), strict=True))
    assert found == pytest.approx({"red": 0.3, "red wine": 0.4, "rose": 0.1})


def test_labels_that_differ_at_once_are_asked_once() -> None:
    model = Speller({b"red": 0.5, b"wine": 0.2, b"soon": 0.3})
    assert asyncio.run(read_tree(["red", "wine"], TABLE, model)) == pytest.approx([0.5, 0.2])
    assert model.asked == 1


def test_labels_that_differ_at_their_ends_alone_are_refused_before_they_cost_much() -> None:
    """Each of three spellings of every stretch is as likely, so that the paths double and treble."""
    table = TokenTable(enumerate([b"a", b"aa", b"aaa", b"b", b"c"]), [(5, "<end>")])
    asked = 0

    async def ask(before: tuple[int, ...], tokens: Sequence[int]) -> Mapping[int, float]:
        nonlocal asked
        asked += 1
        return {token: 1 / len(tokens) for token in tokens}

    with pytest.raises(RequestError, match="begin alike for too long"):
        asyncio.run(read_tree(["a" * 4000 + "b", "a" * 4000 + "c"], table, ask))
    assert asked <= MAX_ASKED


def test_a_beginning_of_several_tokens_is_followed_to_where_the_labels_differ() -> None:
    table = TokenTable(enumerate([b"ab", b"x", b"y"]), [(3, "<end>")])

    async def ask(before: tuple[int, ...], tokens: Sequence[int]) -> Mapping[int, float]:
        return {0: 1.0} if len(before) < 100 else {1: 0.25, 2: 0.75}

    found = asyncio.run(read_tree(["ab" * 100 + "x", "ab" * 100 + "y"], table, ask))
    assert found == pytest.approx([0.25, 0.75])


def test_the_first_that_fails_ends_the_others() -> None:
    ended = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("one")

    async def last() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(ValueError, match="one"):
        asyncio.run(together([fail(), last(), last()]))
    assert ended == [True, True]
