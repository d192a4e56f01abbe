"""Measures of confidences against what was right: calibration error, Brier score, risk against coverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS: Final = 10
ROUNDS: Final = 1000
Z: Final = 1.959964
"""Of a normal distribution, 95 % lie within so many deviations on both sides."""
Z_ONE_SIDED: Final = 1.644854
Numbers: TypeAlias = "NDArray[np.float64]"
Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bin:
    """The answers with a confidence from `low` to `high`: how many, their mean confidence, and the share of right ones.

    `interval` is where that share lies with 95 % (Wilson).
    """

    low: float
    high: float
    count: int
    confidence: float
    right: float
    interval: Interval


def reliability(sure: Numbers, right: Numbers, bins: int = BINS) -> list[Bin]:
    """Return the bins of equal width that have answers. `sure` and `right` (0 or 1) are arrays of one length."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    places = np.searchsorted(edges[1:-1], sure)
    found = []
    for place in range(bins):
        here = places == place
        count = int(here.sum())
        if count:
            share = float(right[here].mean())
            interval = wilson(int(right[here].sum()), count)
            mean = float(sure[here].mean())
            found.append(Bin(float(edges[place]), float(edges[place + 1]), count, mean, share, interval))
    return found


def ece(sure: Numbers, right: Numbers, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance of confidence and share of right ones over the bins."""
    places = np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], sure)
    return float(np.abs(np.bincount(places, sure - right, bins)).sum()) / len(sure)


def brier(sure: Numbers, right: Numbers) -> float:
    """Return the mean squared distance of the confidence from 1 (right) or 0 (wrong)."""
    return float(np.mean((sure - right) ** 2))


def log_loss(sure: Numbers, right: Numbers) -> float:
    """Return the mean negative logarithm of the probability given to what was the case."""
    kept = np.clip(sure, 1e-12, 1 - 1e-12)
    return float(-np.mean(right * np.log(kept) + (1 - right) * np.log(1 - kept)))


def wilson(right: float, count: float, z: float = Z) -> Interval:
    """Return Wilson's interval of a share of `right` out of `count` at `z` deviations; (0, 1) for none."""
    if not count:
        return 0.0, 1.0
    share, slack = right / count, z * z / count
    centre = (share + slack / 2) / (1 + slack)
    half = z * math.sqrt(share * (1 - share) / count + slack / (4 * count)) / (1 + slack)
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_of_lines(lines: Sequence[tuple[int, int]]) -> Interval:
    """Return Wilson's interval of a share whose values come in `lines`, each (right, values): items of lists.

    Those of one line are right or wrong together more often than others, so they count as fewer: as many as independent
    ones whose share would vary so much between lines (by Rao and Scott's design effect, at least 1). Where all are
    right, or all wrong, nothing tells that, and each line counts once.
    """
    right, count = (sum(column) for column in zip(*lines, strict=True)) if lines else (0, 0)
    if len(lines) == count:
        return wilson(right, count)
    share = right / count
    if len(lines) == 1 or share in (0.0, 1.0):
        return wilson(share * len(lines), len(lines))
    spread = sum((hits - share * values) ** 2 for hits, values in lines) * len(lines) / (len(lines) - 1) / count**2
    # So many independent values have that spread.
    independent = 1 + (min(count - 1, share * (1 - share) / spread) if spread else count - 1)
    return wilson(share * independent, independent)


def bootstrap(
    measure: Callable[[Numbers, Numbers], float],
    sure: Numbers,
    right: Numbers,
    groups: Sequence[int] | None = None,
    rounds: int = ROUNDS,
) -> Interval:
    """Return the 95 % interval of `measure` by drawing answers with replacement, `rounds` times; equal each time.

    `groups` are drawn as a whole: answers about one picture are not independent.
    """
    dice = np.random.default_rng(0)
    members: list[NDArray[np.intp]] = [np.array([place]) for place in range(len(sure))]
    if groups is not None and len(set(groups)) < len(groups):
        places: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group, []).append(place)
        members = [np.array(found) for found in places.values()]
    values = []
    for _ in range(rounds):
        drawn = dice.integers(0, len(members), len(members))
        chosen = drawn if len(members) == len(sure) else np.concatenate([members[place] for place in drawn])
        values.append(measure(sure[chosen], right[chosen]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Kept:
    """The answers told at a least confidence `threshold`: the share of all answers, and how many of these are right.

    `interval` is where the precision lies with 95 % (Wilson).
    """

    threshold: float
    coverage: float
    precision: float
    interval: Interval
    count: int


def coverage_curve(sure: Numbers, right: Numbers) -> list[Kept]:
    """Return what is told at each confidence that occurs, the highest first."""
    order = np.argsort(-sure, kind="stable")
    sorted_sure, hits = sure[order], np.cumsum(right[order])
    found = []
    for place, threshold in enumerate(sorted_sure):
        # Answers of one confidence are told together.
        if place + 1 < len(sure) and sorted_sure[place + 1] == threshold:
            continue
        count = place + 1
        found.append(_kept(float(threshold), int(hits[place]), count, len(sure)))
    return found


def kept_at(sure: Numbers, right: Numbers, threshold: float) -> Kept:
    """Return what is told at the least confidence `threshold`."""
    told = sure >= threshold
    return _kept(threshold, int(right[told].sum()), int(told.sum()), len(sure))


def _kept(threshold: float, right: int, count: int, of: int) -> Kept:
    return Kept(threshold, count / of, right / count if count else 1.0, wilson(right, count), count)


def threshold_at(sure: Numbers, right: Numbers, precision: float) -> Kept | None:
    """Return the lowest threshold whose answers are right with at least `precision`; None if there is none.

    So many labels must bear it out that the lower end of the precision, with 95 % on one side (Wilson), reaches it.
    """
    reached = [
        one
        for one in coverage_curve(sure, right)
        if wilson(round(one.precision * one.count), one.count, Z_ONE_SIDED)[0] >= precision
    ]
    return reached[-1] if reached else None
