"""Guesses how an answer goes on, from where its last tokens stood before in prompt or answer. No torch.

Prompt lookup (Saxena 2023), a form of speculative decoding without a second model: the guesses pass the model in one
step with the token that they follow, and each is kept only if it is the token that the sampler chooses there.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qvl.types import SamplingParams

# So many tokens must have stood somewhere in the same order. With fewer, most guesses in free text are wrong.
NGRAM: Final = 3
FIRST: Final = 3
MOST: Final = 15
# Tokens without a guess after a wrong one; doubled with each that follows, so that free text costs a few rows in all.
PAUSE: Final = 8
LONGEST_PAUSE: Final = 512
# Of a prompt, only as many of the last tokens are searched.
SEARCHED: Final = 8192


def can_guess(sampling: SamplingParams) -> bool:
    """True if the token at a place depends on what stands before only through the logits and the place."""
    penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1
    return not any(penalties)


class PromptLookup:
    """The guesses of one sequence, fewer and rarer the more often they are wrong."""

    __slots__ = ("_ends", "_next", "_pause", "_size", "_wrong")

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._next = 0
        self._size = FIRST
        self._wrong = 0
        self._pause = 0

    def guess(self, tokens: ListLike[int], limit: int) -> tuple[int, ...]:
        """Return at most `limit` tokens that may follow `tokens`, which begin with those of earlier calls."""
        if self._pause:
            self._pause -= 1
            return ()
        size = min(limit, self._size)
        if size < 1 or len(tokens) <= NGRAM:
            return ()
        # The newest place of each n-gram; the last n-gram itself is looked up before it is noted.
        for end in range(max(self._next, len(tokens) - SEARCHED, NGRAM), len(tokens)):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._next = len(tokens)
        behind = self._ends.get(tuple(tokens[-NGRAM:]))
        return () if behind is None else tuple(tokens[behind : behind + size])

    def learn(self, guessed: int, right: int) -> None:
        """Note how many of the last guesses were right."""
        if right == guessed:
            self._size = min(2 * self._size, MOST)
        elif right == 0:
            self._size = FIRST
        self._wrong = self._wrong + 1 if right == 0 else 0
        if self._wrong:
            self._pause = min(PAUSE << (self._wrong - 1), LONGEST_PAUSE)
