"""The statistics of agreement: shares with intervals, paired tests, and how many cases a small change takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from qvl.evaluation.measures import Interval, wilson

ROUNDS: Final = 2000
CONFIDENCE: Final = 0.95
POWER: Final = 0.8
# With fewer values a bootstrap says less than it seems to.
LEAST_VALUES: Final = 10
# Of more cases that part, the exact test and the normal one take the same number but for a few.
_MOST_EXACT: Final = 20_000


@dataclass(frozen=True, slots=True)
class Counted:
    """The number of agreeing cases out of `count`, their share, and where it lies with 95 % (Wilson)."""

    agree: int
    count: int
    share: float
    interval: Interval

    @classmethod
    def of(cls, agree: int, count: int) -> Counted:
        return cls(agree, count, agree / count if count else math.nan, wilson(agree, count))


@dataclass(frozen=True, slots=True)
class Paired:
    """McNemar's exact test of two sides judged on the same cases.

    `only_a` and `only_b` are the cases that one side alone has right, `difference` is B's accuracy less A's, with its
    95 % interval (Newcombe's for paired shares), `p_value` how often chance alone parts two equal sides so far.
    """

    count: int
    right_a: int
    right_b: int
    only_a: int
    only_b: int
    difference: float
    interval: Interval
    p_value: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """Return the comparison of which cases A and B have right; both in the order of the cases.

    Raises:
        ValueError: they are not of one length, or empty.
    """
    if len(a) != len(b) or not a:
        raise ValueError("both sides need the same cases, and at least one")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    count, right_a, right_b = len(a), sum(a), sum(b)
    return Paired(
        count, right_a, right_b, only_a, only_b, (right_b - right_a) / count,
        _newcombe(right_a, right_b, only_a, only_b, count), binomial_two_sided(min(only_a, only_b), only_a + only_b),
    )  # fmt: skip


def binomial_two_sided(least: int, count: int) -> float:
    """Return how often a fair coin, thrown `count` times, shows one side `least` times or fewer, or the other so."""
    if not count:
        return 1.0
    # Logarithms, since a thousand throws have more outcomes than a float can count.
    base = count * math.log(2)
    tail = sum(
        math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - base)
        for k in range(least + 1)
    )
    return min(1.0, 2 * tail)


def _newcombe(right_a: int, right_b: int, only_a: int, only_b: int, count: int) -> Interval:
    """Return Newcombe's interval (1998, method 10) of the difference of two paired shares, B's less A's."""
    share_a, share_b = right_a / count, right_b / count
    (low_a, high_a), (low_b, high_b) = wilson(right_a, count), wilson(right_b, count)
    both, neither = right_a - only_a, count - right_a - only_b
    margins = right_a * (count - right_a) * right_b * (count - right_b)
    over = float(both * neither - only_a * only_b)
    # The correction for continuity is his: only where the two sides go together.
    over = max(over - count / 2, 0.0) if over > 0 else over
    phi = over / math.sqrt(margins) if margins else 0.0
    down_b, up_a = share_b - low_b, high_a - share_a
    up_b, down_a = high_b - share_b, share_a - low_a
    difference = share_b - share_a
    low = math.sqrt(max(0.0, down_b**2 - 2 * phi * down_b * up_a + up_a**2))
    high = math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    return max(-1.0, difference - low), min(1.0, difference + high)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of `values` by drawing them with replacement; equal each time.

    Infinite for a single value, which says nothing of others.
    """
    if len(values) < 2:
        return (-math.inf, math.inf)
    dice, found = np.random.default_rng(0), np.asarray(values, dtype=np.float64)
    means = [float(found[dice.integers(0, len(found), len(found))].mean()) for _ in range(ROUNDS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of B less A, the cases drawn together with replacement."""
    return mean_interval([y - x for x, y in zip(a, b, strict=True)])


def cases_to_meet(rate: float, confidence: float = CONFIDENCE) -> int:
    """Return how many cases it takes to meet, with `confidence`, at least one of a kind that is `rate` of all."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - rate))


def cases_to_tell(change: float, parting: float, power: float = POWER, confidence: float = CONFIDENCE) -> int:
    """Return how many labelled cases the exact test of `mcnemar` takes to see a `change` of accuracy with `power`.

    `parting` is the share of cases that exactly one side has right; at least `change`.
    """
    parting = max(parting, change)
    normal = NormalDist()
    alpha, beta = normal.inv_cdf(0.5 + confidence / 2), normal.inv_cdf(power)
    root = alpha * math.sqrt(parting) + beta * math.sqrt(max(0.0, parting - change**2))
    # Connor, 1987: the test that takes the normal distribution for the binomial one. The exact one takes some more.
    count = (root / change) ** 2
    most = 1.3 * count * parting + 50
    if most > _MOST_EXACT:
        return math.ceil(count + 2 / change)
    seen = _seen_by_parting(math.ceil(most), (1 + change / parting) / 2, 1 - confidence)
    found = max(1, math.floor(count))
    step = max(1, found // 400)
    while _power(found, parting, seen) < power:
        found += step
    return found


def _seen_by_parting(most: int, share: float, alpha: float) -> list[float]:
    """Return how often the exact test sees a change among m cases that part, for m from 0 to `most`.

    `share` is that of the cases that the better side alone has right.
    """
    # Distributions of the smaller number: where no side is better, and where A, or B, has the smaller one.
    shares, tails, least, found = (0.5, 1 - share, share), [0.0, 0.0, 0.0], -1, [0.0]
    for count in range(1, most + 1):
        if least >= 0:
            tails = [tail - one * _binomial(least, count - 1, one) for tail, one in zip(tails, shares, strict=True)]
        while 2 * (tails[0] + _binomial(least + 1, count, 0.5)) <= alpha:
            least += 1
            tails = [tail + _binomial(least, count, one) for tail, one in zip(tails, shares, strict=True)]
        found.append(tails[1] + tails[2])
    return found


def _power(count: int, parting: float, seen: Sequence[float]) -> float:
    """Return the power of the test with `count` cases: the mean of `seen` over how many of them part."""
    middle, spread = count * parting, 8 * math.sqrt(count * parting * (1 - parting)) + 1
    places = range(max(0, math.floor(middle - spread)), min(count, math.ceil(middle + spread)) + 1)
    return sum(_binomial(place, count, parting) * seen[min(place, len(seen) - 1)] for place in places)


def _binomial(found: int, count: int, share: float) -> float:
    """Return the probability of `found` out of `count` where each comes with `share`."""
    if not 0.0 < share < 1.0:
        return float(found == count * share)
    chosen = math.lgamma(count + 1) - math.lgamma(found + 1) - math.lgamma(count - found + 1)
    return math.exp(chosen + found * math.log(share) + (count - found) * math.log1p(-share))


def cases_for_share(budget: float, share: float = 1.0, most: int = 1 << 20) -> int | None:
    """Return how many cases decide that a share is within a budget if `share` of them agree; None: no number does."""
    if share <= budget:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if wilson(round(share * middle), middle)[0] >= budget:
            high = middle
        else:
            low = middle + 1
    return low if low < most else None
