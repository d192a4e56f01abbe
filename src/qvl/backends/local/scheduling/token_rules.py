"""What a request says about single tokens: which may come, which come more often, when an answer may end. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qvl.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qvl.types import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The rules of one request; a request without any has none of these.

    Args:
        allowed: the tokens that may come; None for all.
        biased: tokens whose logits are raised by `bias`.
        bad_words: tokens of texts that must not stand in the answer.
        ends: the tokens that end an answer, forbidden before it has `min_tokens`.
    """

    allowed: NDArray[np.int64] | None
    biased: NDArray[np.int64]
    bias: NDArray[np.float32]
    bad_words: tuple[tuple[int, ...], ...]
    ends: NDArray[np.int64]
    min_tokens: int

    @classmethod
    def of(
        cls, sampling: SamplingParams, encode: Callable[[str], list[int]], eos: Iterable[int], vocab_size: int
    ) -> TokenRules | None:
        """Return the rules of a request, None if it has none.

        Raises:
            RequestError: a token is not in the vocabulary, or a bad word is no Unicode text.
        """
        biases = sampling.logit_bias or {}
        named = {"allowed_token_ids": sampling.allowed_token_ids, "logit_bias": biases}
        for param, tokens in (named | {"logprob_token_ids": sampling.logprob_token_ids}).items():
            wrong = next((token for token in tokens if token >= vocab_size), None)
            if wrong is not None:
                what = f"{param}: the token {wrong} is not in the vocabulary"
                raise RequestError(what, hint=f"ids from 0 to {vocab_size - 1}", param=param)
        if any("\ud800" <= letter <= "\udfff" for word in sampling.bad_words for letter in word):
            what = "bad_words: one has half of a surrogate pair, which is not text"
            raise RequestError(what, hint="send whole Unicode characters", param="bad_words")
        if not (sampling.allowed_token_ids or biases or sampling.bad_words or sampling.min_tokens):
            return None
        return cls(
            np.array(sampling.allowed_token_ids, dtype=np.int64) if sampling.allowed_token_ids else None,
            np.array(list(biases), dtype=np.int64),
            np.array(list(biases.values()), dtype=np.float32),
            tuple(spelt for word in sampling.bad_words for spelt in _spellings(word, encode)),
            # A token that is not in the vocabulary ends nothing.
            np.array(
                sorted(token for token in {*eos, *sampling.stop_token_ids} if 0 <= token < vocab_size), dtype=np.int64
            ),
            sampling.min_tokens,
        )

    def forbidden(self, output: list[int]) -> NDArray[np.int64]:
        """Return the tokens that would complete a bad word behind the answer so far."""
        return np.array(
            [word[-1] for word in self.bad_words if len(word) == 1 or output[1 - len(word) :] == list(word[:-1])],
            dtype=np.int64,
        )


def _spellings(word: str, encode: Callable[[str], list[int]]) -> Iterable[tuple[int, ...]]:
    """Yield the tokens of a word at the beginning of a text and behind a space."""
    bare = tuple(encode(word.lstrip()))
    spaced = tuple(encode(" " + word.lstrip()))
    if bare:
        yield bare
    if spaced and spaced != bare:
        yield spaced


@dataclass(slots=True, eq=False)
class ThoughtLimit:
    """The bound of one answer's reasoning: after `budget` tokens of it come those of `closing`."""

    budget: int
    closing: tuple[int, ...]
    since: int | None = None

    def spent(self, num_output: int) -> bool:
        """True if a thought that is still open has had its tokens; `num_output` are those of the answer so far."""
        if self.since is None:
            self.since = num_output
        return num_output - self.since >= self.budget


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A prompt's token after what stands before it: logprob, rank (1 is the likeliest), the best (token, logprob)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class PromptScores:
    """The scores of a prompt's tokens from the second on, in their order; `top` is how many alternatives each has."""

    __slots__ = ("found", "top")

    def __init__(self, top: int) -> None:
        self.top = top
        self.found: list[TokenScore] = []
