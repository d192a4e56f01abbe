"""The statistics of parity against scipy's, and the power of its numbers by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from qvl.evaluation.agreement import (
    Counted,
    binomial_two_sided,
    cases_for_share,
    cases_to_meet,
    cases_to_tell,
    mcnemar,
    mean_interval,
    paired_bootstrap,
)
from qvl.evaluation.measures import wilson
from qvl.parity.budgets import Budgets

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("agree", "count"), [(0, 1), (1, 1), (97, 100), (499, 500), (250, 500), (3, 1000)])
def test_intervals_of_shares_are_wilsons(agree: int, count: int) -> None:
    known = stats.binomtest(agree, count).proportion_ci(0.95, method="wilson")
    assert Counted.of(agree, count).interval == pytest.approx((known.low, known.high), abs=1e-6)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (9, 3), (1, 0), (40, 61), (700, 640)])
def test_mcnemar_is_the_exact_test(only_a: int, only_b: int) -> None:
    a = [True] * only_a + [False] * only_b + [True] * 50 + [False] * 7
    b = [False] * only_a + [True] * only_b + [True] * 50 + [False] * 7
    found = mcnemar(a, b)
    known = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(known, rel=1e-9)
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_newcombes_interval_is_that_of_his_example() -> None:
    """Newcombe 1998, table III: 36 both, 12 and 2 alone, 0 neither; method 10 gives 0.0569 to 0.3404."""
    a = [True] * 36 + [True] * 12 + [False] * 2
    b = [True] * 36 + [False] * 12 + [True] * 2
    found = mcnemar(b, a)
    assert found.difference == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.0569, 0.3404), abs=5e-4)


def test_the_paired_bootstrap_agrees_with_scipys() -> None:
    dice = np.random.default_rng(3)
    a = dice.random(200)
    b = a + dice.normal(0.05, 0.2, 200)
    known = stats.bootstrap(
        (b - a,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert paired_bootstrap(list(a), list(b)) == pytest.approx((known.low, known.high), abs=4e-3)
    assert mean_interval([0.0] * 20) == (0.0, 0.0)


def test_as_many_cases_as_said_meet_what_is_rare() -> None:
    count = cases_to_meet(0.01)
    assert count == 299
    dice = np.random.default_rng(0)
    met = (dice.random((4000, count)) < 0.01).any(axis=1).mean()
    assert met == pytest.approx(0.95, abs=0.012)


def exact_power(count: int, change: float, parting: float) -> float:
    """The power of McNemar's exact test, summed over every number of cases that part."""
    places = np.arange(count + 1)
    least = stats.binom.ppf(0.025, places, 0.5)
    least = np.where(2 * stats.binom.cdf(least, places, 0.5) <= 0.05, least, least - 1)
    share = (parting + change) / (2 * parting)
    seen = stats.binom.cdf(least, places, share) + stats.binom.cdf(least, places, 1 - share)
    return float((stats.binom.pmf(places, count, parting) * seen).sum())


@pytest.mark.parametrize(
    ("change", "parting"),
    [(0.01, 0.02), (0.01, 0.01), (0.05, 0.1), (0.1, 0.3), (0.5, 0.5), (0.9, 0.95), (0.01, 0.2), (0.01, 0.5)],
)
def test_as_many_cases_as_said_tell_a_change_of_accuracy(change: float, parting: float) -> None:
    count = cases_to_tell(change, parting)
    assert exact_power(count, change, parting) >= 0.8
    if count > 100:
        # No more than are needed.
        assert exact_power(round(0.98 * count), change, parting) < 0.8


@pytest.mark.parametrize(("change", "parting"), [(0.01, 0.02), (0.1, 0.3)])
def test_the_power_is_what_drawn_answers_have(change: float, parting: float) -> None:
    """Answers of two models are drawn, and `mcnemar` itself is asked whether it sees the change."""
    count, dice = cases_to_tell(change, parting), np.random.default_rng(0)
    told = 0
    for _ in range(1500):
        drawn = dice.random(count)
        a = drawn < (parting - change) / 2
        b = (drawn >= (parting - change) / 2) & (drawn < parting)
        told += mcnemar(a.tolist(), b.tolist()).p_value <= 0.05
    assert told / 1500 == pytest.approx(0.805, abs=0.025)


def test_a_budget_is_decided_with_as_many_cases_as_it_says() -> None:
    budgets = Budgets.read(["text=0.98"])
    enough = cases_for_share(0.98)
    assert enough is not None
    (verdict,) = budgets.judge({"text": Counted.of(enough - 1, enough - 1)}, None)
    assert verdict.standing == "undecided"
    (verdict,) = budgets.judge({"text": Counted.of(enough, enough)}, None)
    assert verdict.standing == "within"
    (verdict,) = budgets.judge({"text": Counted.of(90, 100)}, None)
    assert verdict.standing == "beyond"
    assert wilson(90, 100)[1] < 0.98
    assert cases_for_share(0.98, 0.97) is None


def test_noise_leaves_undecided_what_is_not_within() -> None:
    (verdict,) = Budgets.read(["text=0.98"]).judge({"text": Counted.of(90, 100)}, None, "A disagrees with itself")
    assert verdict.standing == "undecided"


def test_the_coin() -> None:
    for count in (1, 7, 50, 2000):
        for least in (0, count // 3, count // 2):
            assert binomial_two_sided(least, count) == pytest.approx(stats.binomtest(least, count).pvalue, rel=1e-8)
