"""Plain counters and histograms give the very text that prometheus_client's own give."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from qvl.server.plain_metrics import PlainCounter, PlainHistogram

BOUNDS = (0.001, 0.25, 1.0, 40.0)


def text(registry: CollectorRegistry) -> list[str]:
    """The lines of a scrape, without those that tell when a series began."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_histogram_is_prometheus_own_also_at_the_bounds_and_above_them() -> None:
    plain, known = CollectorRegistry(), CollectorRegistry()
    ours = PlainHistogram("qvl_wait_seconds", "Waiting.", BOUNDS, registry=plain)
    theirs = Histogram("qvl_wait_seconds", "Waiting.", buckets=BOUNDS, registry=known)
    assert text(plain) == text(known)
    chance = random.Random(0)
    for seconds in (0.0, *BOUNDS, 1e6, *(chance.expovariate(1) for _ in range(100))):
        ours.observe(seconds)
        theirs.observe(seconds)
        assert text(plain) == text(known)


def test_counters_are_prometheus_own_with_labels_and_without() -> None:
    plain, known = CollectorRegistry(), CollectorRegistry()
    ours = PlainCounter("qvl_answers", "Answers.", registry=plain)
    theirs = Counter("qvl_answers", "Answers.", registry=known)
    ours_by = PlainCounter("qvl_http", "HTTP.", ["route", "status"], registry=plain)
    theirs_by = Counter("qvl_http", "HTTP.", ["route", "status"], registry=known)
    assert text(plain) == text(known)
    for amount, route, status in ((1, "/a", "200"), (2.5, '/b"\n', "404"), (1, "/a", "200"), (0, "/c", "200")):
        ours.inc(amount)
        theirs.inc(amount)
        ours_by.inc(amount, route, status)
        theirs_by.labels(route, status).inc(amount)
        assert text(plain) == text(known)


def test_what_no_counter_counts_is_refused_and_costs_no_scrape() -> None:
    registry = CollectorRegistry()
    counter = PlainCounter("qvl_http", "HTTP.", ["status"], registry=registry)
    for amount, values in ((-1, ("200",)), (1, ()), (1, ("200", "x"))):
        with pytest.raises(ValueError, match="qvl_http cannot count"):
            counter.inc(amount, *values)
    counter.inc(1, None)  # type: ignore[arg-type]
    assert text(registry)[2:] == ['qvl_http_total{status="None"} 1.0']
