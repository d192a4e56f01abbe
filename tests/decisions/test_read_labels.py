"""The probability of a whole label is that of every spelling of it in tokens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence

import pytest

from qvl.backends.token_table import TokenTable
from qvl.decisions.read_labels import read_tree

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
