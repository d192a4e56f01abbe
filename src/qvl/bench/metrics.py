"""Computation of a run's figures from its records, in one pass and bounded memory.

`FORMULAS` defines the figures. The steady part is the time in which every client was busy (closed loop) or requests
were due (open loop), without the ramp and the last answers. In a closed loop a request counts by the share of its time
in the steady part; in an open loop, where requests may wait for long, only if it is complete inside it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypedDict

from qvl.bench.record import RequestRecord

FIGURES: Final = ("ttft", "tpot", "itl", "e2e", "first_byte", "queue", "network", "client_wait")
FORMULAS: Final = {
    "tpot": "(E2E - TTFT) / (completion_tokens - 1)",
    "ttft": "first chunk with content - intended start",
    "itl": "between two chunks of one stream",
    "e2e": "end of the answer - intended start",
    "requests_per_second": "closed loop: sum over answers of (share of its time inside the steady part) / length of "
    "that part; open loop: answers complete inside the steady part / length of that part",
}
KEPT: Final = 100_000
# Fewer answers inside a steady part say too little: the whole session is taken.
FEW: Final = 10


class Stats(TypedDict):
    n: int
    mean: float
    std: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float


Figures: TypeAlias = dict[str, Stats | None]


class RequestCounts(TypedDict):
    sent: int
    ok: int
    failed: int
    success_rate: float | None


class RetryCounts(TypedDict):
    requests: int
    retries: int
    by_kind: dict[str, int]
    figures: Figures


class Throughput(TypedDict):
    """Rates over `steady_seconds`; `steady` is False if there was no steady part, so that they are of the whole run."""

    requests_per_second: float | None
    prompt_tokens_per_second: float | None
    completion_tokens_per_second: float | None
    steady_seconds: float
    steady: bool
    goodput_requests_per_second: float | None


class Goodput(TypedDict):
    share: float | None
    slo: dict[str, float]


class TokenCounts(TypedDict):
    prompt: Stats | None
    completion: Stats | None
    cached: int
    counted_by: str


class PictureCounts(TypedDict):
    requests: int
    pictures: int
    image_tokens: int
    expected_tokens: int
    prompt_tokens: int


class CacheFigures(TypedDict):
    states: dict[str, int]
    figures: dict[str, Figures]


class GroupSummary(TypedDict):
    """The figures of one endpoint at one stage; times in seconds."""

    requests: RequestCounts
    errors: dict[str, int]
    error_examples: dict[str, str]
    retries: RetryCounts
    figures: Figures
    throughput: Throughput
    goodput: Goodput | None
    tokens: TokenCounts
    pictures: PictureCounts
    cache: CacheFigures


class Sample:
    """Statistics of a stream of numbers, exact except for percentiles of more than `KEPT` numbers (a random sample)."""

    __slots__ = ("_dice", "_square", "high", "low", "mean", "n", "values")

    def __init__(self) -> None:
        self.values: list[float] = []
        self.n = 0
        self.mean = 0.0
        self._square = 0.0
        self.low, self.high = float("inf"), float("-inf")
        self._dice = random.Random(0)

    def add(self, value: float) -> None:
        self.n += 1
        off = value - self.mean
        self.mean += off / self.n
        self._square += off * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)
        if len(self.values) < KEPT:
            self.values.append(value)
        else:
            index = self._dice.randrange(self.n)
            if index < KEPT:
                self.values[index] = value

    @property
    def std(self) -> float:
        """The standard deviation with n - 1; 0 for fewer than two numbers."""
        return float((self._square / (self.n - 1)) ** 0.5) if self.n > 1 else 0.0

    def stats(self) -> Stats | None:
        """Return the rounded statistics; None without values."""
        if not self.n:
            return None
        import numpy as np

        p50, p90, p95, p99 = (round(float(value), 6) for value in np.percentile(self.values, (50, 90, 95, 99)))
        mean, std, low, high = (round(value, 6) for value in (self.mean, self.std, self.low, self.high))
        return Stats(n=self.n, mean=mean, std=std, min=low, max=high, p50=p50, p90=p90, p95=p95, p99=p99)


class Windows:
    """The steady parts of one endpoint in one session, in order."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        self.spans = sorted(spans)
        self._starts = [start for start, _ in self.spans]
        self.length = sum(end - start for start, end in self.spans)

    def hold(self, moment: float) -> bool:
        """True if `moment` is in a steady part."""
        index = bisect_right(self._starts, moment) - 1
        return index >= 0 and moment <= self.spans[index][1]

    def share(self, start: float, end: float) -> float:
        """Return the share of [start, end] inside steady parts, from 0 to 1."""
        if end <= start:
            return 1.0 if any(low <= start <= high for low, high in self.spans) else 0.0
        inside = 0.0
        for index in range(bisect_right(self._starts, end) - 1, -1, -1):
            low, high = self.spans[index]
            if high <= start:
                break
            inside += min(high, end) - max(low, start)
        return inside / (end - start)


@dataclass
class SessionSpan:
    """Counts, first start and last end of one session at one endpoint and stage."""

    first: float = float("inf")
    last: float = 0.0
    done: int = 0
    good: int = 0
    prompt: int = 0
    completion: int = 0
    weights: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])


class Group:
    """The accumulated figures of one endpoint at one stage; `open_loop` is True for an open loop."""

    def __init__(
        self, windows: Mapping[int, Windows], full: bool, slo: Mapping[str, float], *, open_loop: bool = False
    ) -> None:
        self.windows = windows
        self.open_loop = open_loop
        self.full = full
        self.slo = dict(slo)
        self.samples = {name: Sample() for name in FIGURES}
        self.by_cache: dict[str, dict[str, Sample]] = {}
        self.retried = {name: Sample() for name in ("ttft", "e2e")}
        self.tally: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.retries: Counter[str] = Counter()
        self.cache: Counter[str] = Counter()
        self.prompt_tokens = Sample()
        self.completion_tokens = Sample()
        self.spans: dict[int, SessionSpan] = {}

    def add(self, record: RequestRecord) -> None:
        """Add one measured record."""
        tally = self.tally
        tally["sent"] += 1
        tally["retried"] += record.retry_count > 0
        self.retries.update(record.retried_for)
        tally["with_pictures"] += record.pictures > 0 and record.error_kind != "picture"
        tally["pictures"] += record.pictures if record.error_kind != "picture" else 0
        if not record.success:
            kind = record.error_kind or "unknown"
            self.errors[kind] += 1
            self.examples.setdefault(kind, (record.error or "")[:300])
            return
        tally["ok"] += 1
        tally["uncounted"] += not record.counted
        tally["image_tokens"] += record.image_tokens
        tally["cached_tokens"] += record.cached_tokens
        if record.pictures:
            tally["ok_with_pictures"] += 1
            tally["picture_prompt_tokens"] += record.prompt_tokens
            tally["pixel_tokens"] += record.pixel_tokens
        self.prompt_tokens.add(record.prompt_tokens)
        self.completion_tokens.add(record.completion_tokens)
        good = self._meets(record)
        tally["good"] += good
        self._measure(record)
        self._weigh(record, good)

    def _measure(self, record: RequestRecord) -> None:
        if record.cache is not None:
            self.cache[record.cache] += 1
        if record.phase != "measure":
            return
        values = {
            "ttft": record.ttft,
            "tpot": record.tpot,
            "e2e": record.latency,
            "first_byte": record.first_byte,
            "queue": record.server_queue,
            "network": None if record.server_total is None else record.latency - record.server_total,
            "client_wait": record.wait,
        }
        for name, value in values.items():
            if value is not None:
                self.samples[name].add(value)
        for gap in record.itl:
            self.samples["itl"].add(gap)
        apart = [self.retried] if record.retry_count else []
        if record.cache is not None:
            state = "hit" if record.cache == "hit" else "miss"
            apart.append(self.by_cache.setdefault(state, {name: Sample() for name in ("ttft", "tpot", "e2e")}))
        for samples in apart:
            for name, sample in samples.items():
                if (value := values[name]) is not None:
                    sample.add(value)

    def _weigh(self, record: RequestRecord, good: bool) -> None:
        span = self.spans.setdefault(record.session, SessionSpan())
        span.first, span.last = min(span.first, record.start), max(span.last, record.end)
        span.done += 1
        span.good += good
        span.prompt += record.prompt_tokens
        span.completion += record.completion_tokens
        windows = self.windows.get(record.session)
        if windows is not None:
            share = float(windows.hold(record.end)) if self.open_loop else windows.share(record.start, record.end)
            amounts = (1, good, record.prompt_tokens, record.completion_tokens)
            span.weights = [weight + share * amount for weight, amount in zip(span.weights, amounts, strict=True)]

    def _meets(self, record: RequestRecord) -> bool:
        itl = max(record.itl, default=None)
        values = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.latency, "itl": itl}
        return all(value is None or value <= self.slo[name] for name, value in values.items() if name in self.slo)

    def throughput(self) -> Throughput:
        """Return the rates over the steady parts; over whole sessions if no part was steady."""
        seconds, sums = 0.0, [0.0, 0.0, 0.0, 0.0]
        for session, span in self.spans.items():
            windows = self.windows.get(session)
            few = self.open_loop and span.weights[0] < FEW
            if windows is not None and windows.length > 0 and not few:
                seconds += windows.length
                amounts: Sequence[float] = span.weights
            else:
                seconds += span.last - span.first
                amounts = (span.done, span.good, span.prompt, span.completion)
            sums = [total + amount for total, amount in zip(sums, amounts, strict=True)]
        requests, good, prompt, completion = (round(total / seconds, 4) if seconds > 0 else None for total in sums)
        return {
            "requests_per_second": requests,
            "prompt_tokens_per_second": prompt,
            "completion_tokens_per_second": completion,
            "steady_seconds": round(seconds, 4),
            "steady": self.full,
            "goodput_requests_per_second": good if self.slo else None,
        }

    def summary(self) -> GroupSummary:
        """Return the group as JSON values; times in seconds."""
        tally = self.tally
        sent = tally["sent"]
        return {
            "requests": {
                "sent": sent,
                "ok": tally["ok"],
                "failed": sent - tally["ok"],
                "success_rate": _share(tally["ok"], sent),
            },
            "errors": dict(self.errors.most_common()),
            "error_examples": self.examples,
            "retries": {
                "requests": tally["retried"],
                "retries": self.retries.total(),
                "by_kind": dict(self.retries.most_common()),
                "figures": _figures(self.retried) if tally["retried"] else {},
            },
            "figures": _figures(self.samples),
            "throughput": self.throughput(),
            "goodput": {"share": _share(tally["good"], sent), "slo": self.slo} if self.slo else None,
            "tokens": {
                "prompt": self.prompt_tokens.stats(),
                "completion": self.completion_tokens.stats(),
                "cached": tally["cached_tokens"],
                "counted_by": "the server" if not tally["uncounted"] else "pieces of the stream",
            },
            "pictures": {
                "requests": tally["with_pictures"],
                "pictures": tally["pictures"],
                "image_tokens": tally["image_tokens"],
                "expected_tokens": tally["pixel_tokens"],
                "prompt_tokens": tally["picture_prompt_tokens"],
            },
            "cache": {
                "states": dict(self.cache),
                "figures": {state: _figures(samples) for state, samples in self.by_cache.items()},
            },
        }


def _figures(samples: Mapping[str, Sample]) -> Figures:
    return {name: sample.stats() for name, sample in samples.items()}


def _share(count: int, total: int) -> float | None:
    return round(count / total, 6) if total else None
