"""Sums up compared cases in bounded memory: counts, divergences, times, and the worst cases."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qvl.evaluation.agreement import Counted
from qvl.parity.differences import LAYERS, Difference, Layer, by_field

WORST: Final = 10
# More kinds of failures than these are no longer told apart.
MOST_REASONS: Final = 100
# What one failure alone says: numbers, and what is quoted.
_OWN: Final = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why cases failed: on which side, "A", "B" or "A and B" for one reason, how many, and what one of them says."""

    side: str
    count: int
    error: str


@dataclass(slots=True)
class ParityTally:
    """The sums over compared cases."""

    worst_cases: int = WORST
    cases: int = 0
    both_failed: int = 0
    one_failed: int = 0
    ties: int = 0
    layers: Counter[Layer] = field(default_factory=Counter)
    shown: Counter[Layer] = field(default_factory=Counter)
    agree: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    divergences: list[float] = field(default_factory=list)
    distances: dict[str, list[float]] = field(default_factory=dict)
    deviations: list[float] = field(default_factory=list)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    tokens: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    parting: dict[str, Layer] = field(default_factory=dict)
    _reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    _told: dict[tuple[str, str], str] = field(default_factory=dict)
    _worst: list[tuple[tuple[int, float], int, Difference]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def add(self, one: Difference) -> None:
        """Count a compared case."""
        self.cases += 1
        self._count("answered", not any(one.failed))
        self._failures(one)
        self.shown.update(one.layers.keys())
        if one.layer is not None:
            self.layers[one.layer] += 1
            self.parting[one.case] = one.layer
            self.ties += one.near_tie
            entry = (one.weight, -next(self._order), one)
            (heapq.heappush if len(self._worst) < self.worst_cases else heapq.heappushpop)(self._worst, entry)
        if "text" in one.layers:
            self._count("text", one.layers["text"])
        for name, same in by_field(one.fields).items():
            self._count(f"field.{name}", same)
        if one.fields:
            self._count("fields", one.layers["fields"])
        for name, same in one.choices.items():
            self._count(f"decision.{name}", same)
        if one.choices:
            self._count("decisions", all(one.choices.values()))
        if one.first is not None:
            self._count("token", one.first.ranks == (1, 1))
            self.divergences.append(one.first.divergence)
        elif one.layers.get("answered") is False and "log-probabilities" in one.layers:
            self._count("token", same=False)
        if one.deviation is not None:
            self.deviations.append(one.deviation)
        for name, distance in one.distances.items():
            self.distances.setdefault(name, []).append(distance)
        if not any(one.failed):
            for side in (0, 1):
                self.seconds[side].append(one.seconds[side])
                self.tokens[side].append(one.tokens[side])

    def _failures(self, one: Difference) -> None:
        if not any(one.failed):
            return
        self.both_failed += all(one.failed)
        self.one_failed += not all(one.failed)
        alike = one.errors[0] == one.errors[1]
        told = [("A and B", one.errors[0])] if alike else [("A", one.errors[0]), ("B", one.errors[1])]
        for side, error in told:
            if error is None:
                continue
            kind = (side, _OWN.sub("…", error))
            if kind not in self._told and len(self._told) >= MOST_REASONS:
                kind = (side, "")
            self._told.setdefault(kind, error)
            self._reasons[kind] += 1

    def reasons(self) -> list[Reason]:
        """Return why cases failed, the most frequent first."""
        return [Reason(kind[0], count, self._told[kind]) for kind, count in self._reasons.most_common()]

    def _count(self, name: str, same: bool) -> None:
        self.asked[name] += 1
        self.agree[name] += same

    def agreement(self) -> Mapping[str, Counted]:
        """Return the share of agreeing cases of each measure, with its interval."""
        return {name: Counted.of(self.agree[name], count) for name, count in self.asked.items()}

    def worst(self) -> list[Difference]:
        """Return the cases that part the most, the worst first."""
        return [one for _, _, one in sorted(self._worst, key=lambda entry: entry[:2], reverse=True)]

    @property
    def first_layer(self) -> Layer | None:
        """The first layer at which any case parts; None if none does."""
        return next((name for name in LAYERS if self.layers[name]), None)
