"""Comparison of answers with expected ones, and of endpoints with each other, request by request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, TypedDict

from qvl.bench.metrics import Sample, Stats
from qvl.bench.record import RequestRecord

DIFFERENCES: Final = ("ttft", "tpot", "e2e")
MOST_FIELDS: Final = 200
MOST_WAITING: Final = 100_000


class FieldAgreement(TypedDict):
    same: int
    of: int


class AgreementSummary(TypedDict):
    """Shares of equal answers, from 0 to 1."""

    compared: int
    exact: float
    fields: dict[str, FieldAgreement]


class MeanDifference(TypedDict):
    """The mean of `n` differences with its 95 % confidence interval, and their median."""

    n: int
    mean: float
    low: float
    high: float
    median: float


class PairSummary(TypedDict):
    endpoint: int
    against: int
    differences: dict[str, MeanDifference | None]
    answers: AgreementSummary | None


class Agreement:
    """Counts of equal answers: as a whole, and per field if both are objects."""

    def __init__(self) -> None:
        self.compared = 0
        self.exact = 0
        self.fields: dict[str, FieldAgreement] = {}

    def add(self, expected: object, response: str | None) -> None:
        """Count one comparison of an answer with `expected`; a `response` of None is never equal."""
        self.compared += 1
        reference, answer = read_answer(expected), read_answer(response)
        self.exact += reference == answer
        if not isinstance(reference, dict):
            return
        leaves = _leaves(answer) if isinstance(answer, dict) else {}
        for name, value in _leaves(reference).items():
            if name not in self.fields and len(self.fields) >= MOST_FIELDS:
                continue
            counts = self.fields.setdefault(name, {"same": 0, "of": 0})
            counts["same"] += name in leaves and leaves[name] == value
            counts["of"] += 1

    def summary(self) -> AgreementSummary | None:
        """Return the shares; None if nothing was compared."""
        if not self.compared:
            return None
        return {"compared": self.compared, "exact": round(self.exact / self.compared, 6), "fields": self.fields}


class Pairs:
    """Time differences (in seconds) between each endpoint and the first one for the same requests."""

    def __init__(self, endpoints: int) -> None:
        self.endpoints = endpoints
        self.samples = [{name: Sample() for name in DIFFERENCES} for _ in range(endpoints)]
        self.agreements = [Agreement() for _ in range(endpoints)]
        self._waiting: dict[tuple[int, int], dict[int, RequestRecord]] = {}

    def add(self, record: RequestRecord) -> None:
        """Add a measured record; it is compared when all endpoints have answered the same request."""
        key = (record.stage, record.index)
        records = self._waiting.setdefault(key, {})
        records[record.endpoint] = record
        if len(records) == self.endpoints:
            del self._waiting[key]
            for number in range(1, self.endpoints):
                self._compare(records[0], records[number], number)
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
            reference, value = getattr(first, field), getattr(other, field)
            if reference is not None and value is not None:
                sample.add(value - reference)

    def summary(self) -> list[PairSummary]:
        """Return one entry for each endpoint after the first."""
        return [
            {
                "endpoint": number,
                "against": 0,
                "differences": {name: interval(sample) for name, sample in self.samples[number].items()},
                "answers": self.agreements[number].summary(),
            }
            for number in range(1, self.endpoints)
        ]


def interval(sample: Sample) -> MeanDifference | None:
    """Return mean, median and 95 % interval (Student's t) of the differences in `sample`; None for fewer than two."""
    if sample.n < 2:
        return None
    import numpy as np

    low, high = _t_interval(sample.mean, sample.std / sample.n**0.5, sample.n - 1)
    mean, low, high, median = (round(value, 6) for value in (sample.mean, low, high, float(np.median(sample.values))))
    return {"n": sample.n, "mean": mean, "low": low, "high": high, "median": median}


def welch(old: Stats, new: Stats) -> tuple[float, float] | None:
    """Return the 95 % confidence interval (Welch) of the mean of `new` minus that of `old`; None below two values each.

    scipy's version needs every value, so only the quantile of Student's t is taken from it.
    """
    if old["n"] < 2 or new["n"] < 2:
        return None
    variances = old["std"] ** 2 / old["n"], new["std"] ** 2 / new["n"]
    freedom = 1.0
    if any(variances):
        freedom = sum(variances) ** 2 / (variances[0] ** 2 / (old["n"] - 1) + variances[1] ** 2 / (new["n"] - 1))
    return _t_interval(new["mean"] - old["mean"], float(sum(variances) ** 0.5), freedom)


def _t_interval(mean: float, error: float, freedom: float) -> tuple[float, float]:
    from scipy import stats

    reach = float(stats.t.ppf(0.975, freedom)) * error
    return mean - reach, mean + reach


def read_answer(value: object) -> object:
    """Return the JSON object of an answer (a Markdown fence is removed), else its text without outer whitespace."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    if text.startswith("{"):
        with suppress(ValueError):
            parsed: object = json.loads(text)
            return parsed
    return text


def _leaves(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, child in value.items():
        if isinstance(child, dict) and child:
            leaves.update(_leaves(child, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = child.strip() if isinstance(child, str) else child
    return leaves
