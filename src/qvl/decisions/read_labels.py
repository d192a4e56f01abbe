"""Reads the probability of whole labels from the probabilities of tokens, through the tree of their beginnings.

A token that only one label begins with decides for that label. One that several begin with is followed: the question
is asked again behind it. So a label of three tokens is as likely as its text, whatever its spelling in tokens.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from qvl.errors import BackendResponseError, RequestError

if TYPE_CHECKING:
    from qvl.backends.token_table import TokenTable
    from qvl.types import TokenLogprob

T = TypeVar("T")
Ask: TypeAlias = "Callable[[tuple[int, ...], Sequence[int]], Awaitable[Mapping[int, float]]]"
"""Returns the probability of each token of the second argument behind those of the first."""
NEGLIGIBLE: Final = 1e-4
"""A token that several labels begin with is not followed if it has less than this part of what all tokens of
labels have there: each label gets the same of it."""
MAX_ASKED: Final = 256
"""Beginnings that are followed at most, for labels that differ at their ends alone."""
FULL_STOPS: Final = (b"\n", b".")
"""What a model may write behind a whole label instead of the end of the answer."""


async def read_tree(labels: Sequence[str], table: TokenTable, ask: Ask) -> list[float]:
    """Return the probability of each label as the model's whole answer, in the order of `labels`.

    They add up to at most 1: to as much as the labels have together.

    Raises:
        RequestError: the labels begin alike for too long.
    """
    texts = [label.encode() for label in labels]
    found = [0.0] * len(texts)
    asked = 0

    async def follow(begun: bytes, tokens: tuple[int, ...], whom: Sequence[int], share: float) -> None:
        nonlocal asked
        asked += 1
        if asked > MAX_ASKED:
            what = f"the options {labels[whom[0]][:40]!r} and {labels[whom[1]][:40]!r} begin alike for too long"
            raise RequestError(what, hint="tell them apart by their first words", param="questions")
        candidates: dict[int, bytes] = {}
        for index in whom:
            rest = texts[index][len(begun) :]
            if rest:
                candidates |= dict(table.beginnings(rest))
        if any(texts[index] == begun for index in whom):
            stops = [pair for stop in FULL_STOPS for pair in table.beginnings(stop)]
            candidates = dict.fromkeys(table.ends, b"") | {token: b"" for token, _ in stops} | candidates
        shares = await ask(tokens, [*candidates])
        whole = share * math.fsum(shares.values())
        onward = []
        for token, data in candidates.items():
            part = share * shares.get(token, 0.0)
            if part <= 0.0:
                continue
            now = begun + data
            fits = [i for i in whom if (texts[i].startswith(now) if data else texts[i] == begun)]
            if len(fits) == 1:
                found[fits[0]] += part
            elif part < NEGLIGIBLE * whole:
                for index in fits:
                    found[index] += part / len(fits)
            else:
                onward.append(follow(now, (*tokens, token), fits, part))
        await together(onward)

    await follow(b"", (), range(len(texts)), 1.0)
    return found


async def together(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Return the results of all; the first that fails, or the caller's end, ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        if not all(task.done() for task in tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def read_top(labels: Sequence[str], top: Sequence[TokenLogprob]) -> list[float]:
    """Return the probability of each label from the likeliest first tokens of an answer.

    No label may begin another: a token counts for the first label that it begins.
    """
    found = [0.0] * len(labels)
    for item in top:
        text = item.token.strip().casefold()
        index = next((index for index, label in enumerate(labels) if text and label.casefold().startswith(text)), None)
        if index is not None:
            found[index] += probability(item.logprob)
    return found


def probability(logprob: float) -> float:
    """Return the probability of a log probability, at most 1.

    Raises:
        BackendResponseError: it is not a number.
    """
    if math.isnan(logprob):
        raise BackendResponseError("a log probability of the answer is NaN", hint="another model, dtype or endpoint")
    return math.exp(min(logprob, 0.0))
