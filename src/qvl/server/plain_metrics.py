"""Counters and histograms of one event loop: plain numbers, which become Prometheus' samples when they are scraped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


class PlainCounter(Collector):
    """A counter of the name `name`, with a series for each combination of values of `labels`."""

    def __init__(self, name: str, about: str, labels: Sequence[str] = (), *, registry: CollectorRegistry) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._counts: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        registry.register(self)

    def inc(self, amount: float = 1.0, *values: str) -> None:
        """Add `amount`, 0 or more, to the series with the label values `values`.

        Raises:
            ValueError: a negative amount, or not one value for each label.
        """
        if amount < 0 or len(values) != len(self._labels):
            raise ValueError(f"{self._name} cannot count {amount} for {values}")
        self._counts[values] = self._counts.get(values, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for values, count in self._counts.items():
            family.add_metric([*map(str, values)], count)
        yield family


class PlainHistogram(Collector):
    """A histogram of seconds of the name `name`; `bounds` are the upper ends of its buckets, ascending."""

    def __init__(self, name: str, about: str, bounds: Sequence[float], *, registry: CollectorRegistry) -> None:
        self._name, self._about, self._bounds = name, about, bounds
        # The last one is of what is above all bounds.
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._about)
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric([], [*zip(ends, accumulate(self._counts), strict=True)], self._sum)
        yield family
