"""Answers held against what was expected, and endpoints against each other, request by request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from qvl.bench.metrics import Sample
from qvl.bench.record import RequestRecord

DIFFERENCES: Final = ("ttft", "tpot", "e2e")
MOST_FIELDS: Final = 200
MOST_WAITING: Final = 100_000


class Agreement:
    """How often two answers are the same: as a whole, and field by field where both are objects."""

    def __init__(self) -> None:
        self.compared = 0
        self.exact = 0
        self.fields: dict[str, list[int]] = {}

    def add(self, wanted: Any, said: str | None) -> None:
        """Compares; a missing answer agrees with nothing."""
        self.compared += 1
        left = read_answer(wanted)
        right = read_answer(said)
        self.exact += left == right
        if not isinstance(left, dict):
            return
        found = _leaves(right) if isinstance(right, dict) else {}
        for name, value in _leaves(left).items():
            if name not in self.fields and len(self.fields) >= MOST_FIELDS:
                continue
            counts = self.fields.setdefault(name, [0, 0])
            counts[0] += name in found and found[name] == value
            counts[1] += 1

    def summary(self) -> dict[str, Any] | None:
        """Shares from 0 to 1; None when nothing was compared."""
        if not self.compared:
            return None
        return {
            "compared": self.compared,
            "exact": round(self.exact / self.compared, 6),
            "fields": {name: {"same": same, "of": of} for name, (same, of) in self.fields.items()},
        }


class Pairs:
    """The same request at several endpoints: differences to the first, in seconds."""

    def __init__(self, endpoints: int) -> None:
        self.endpoints = endpoints
        self.samples = [{name: Sample() for name in DIFFERENCES} for _ in range(endpoints)]
        self.agreements = [Agreement() for _ in range(endpoints)]
        self._waiting: dict[tuple[int, int], dict[int, RequestRecord]] = {}

    def add(self, record: RequestRecord) -> None:
        """Takes a measured record; a pair is looked at when it is whole."""
        key = (record.stage, record.index)
        held = self._waiting.setdefault(key, {})
        held[record.endpoint] = record
        if len(held) == self.endpoints:
            del self._waiting[key]
            for number in range(1, self.endpoints):
                self._compare(held[0], held[number], number)
        elif len(self._waiting) > MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def _compare(self, first: RequestRecord, other: RequestRecord, number: int) -> None:
        if not (first.success and other.success):
            return
        self.agreements[number].add(first.response, other.response)
        if first.phase != "measure" or other.phase != "measure":
            return
        for name, sample in self.samples[number].items():
            field = "latency" if name == "e2e" else name
            mine, theirs = getattr(first, field), getattr(other, field)
            if mine is not None and theirs is not None:
                sample.add(theirs - mine)

    def summary(self) -> list[dict[str, Any]]:
        """One entry an endpoint after the first."""
        return [
            {
                "endpoint": number,
                "against": 0,
                "differences": {name: interval(sample) for name, sample in self.samples[number].items()},
                "answers": self.agreements[number].summary(),
            }
            for number in range(1, self.endpoints)
        ]


def interval(sample: Sample) -> dict[str, float] | None:
    """Mean of the differences with its 95 % confidence interval (Student's t), and their median; None below two."""
    if sample.n < 2:
        return None
    import numpy as np
    from scipy import stats

    reach = float(stats.t.ppf(0.975, sample.n - 1)) * sample.std / sample.n**0.5
    found = {
        "mean": sample.mean,
        "low": sample.mean - reach,
        "high": sample.mean + reach,
        "median": float(np.median(sample.values)),
    }
    return {"n": sample.n, **{name: round(value, 6) for name, value in found.items()}}


def welch(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float] | None:
    """Difference of two means with its 95 % confidence interval, out of n, mean and std of each (Welch)."""
    if old["n"] < 2 or new["n"] < 2:
        return None
    from scipy import stats

    spread = old["std"] ** 2 / old["n"], new["std"] ** 2 / new["n"]
    error = sum(spread) ** 0.5
    difference = new["mean"] - old["mean"]
    if error == 0:
        return {"mean": difference, "low": difference, "high": difference}
    freedom = sum(spread) ** 2 / (spread[0] ** 2 / (old["n"] - 1) + spread[1] ** 2 / (new["n"] - 1))
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return {"mean": difference, "low": difference - reach, "high": difference + reach}


def read_answer(value: Any) -> Any:
    """A JSON object out of an answer where it is one (a Markdown fence is taken off), else its text, trimmed."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, held in value.items():
        if isinstance(held, dict) and held:
            found.update(_leaves(held, f"{prefix}{name}."))
        else:
            found[prefix + name] = held.strip() if isinstance(held, str) else held
    return found
