"""Measures: equal to scikit-learn's and scipy's, and right about simulated truths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from qvl.evaluation import measures


def simulated(count: int = 2000, seed: int = 5, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and what is right with the probability confidence ** power."""
    dice = np.random.default_rng(seed)
    sure = dice.beta(2, 1, count)
    return sure, (dice.uniform(0, 1, count) < sure**power).astype(float)


def test_the_reliability_diagram_is_that_of_scikit_learn() -> None:
    sure, right = simulated()
    shares, means = calibration_curve(right, sure, n_bins=10)
    bins = measures.reliability(sure, right)
    assert np.allclose([one.right for one in bins], shares)
    assert np.allclose([one.confidence for one in bins], means)
    assert sum(one.count for one in bins) == len(sure)


def test_the_calibration_error_is_the_weighted_distance_of_scikit_learns_curve() -> None:
    sure, right = simulated(power=2.0)
    shares, means = calibration_curve(right, sure, n_bins=10)
    weights = np.histogram(sure, bins=np.linspace(0, 1, 11))[0]
    expected = (np.abs(shares - means) * weights[weights > 0]).sum() / len(sure)
    assert measures.ece(sure, right) == pytest.approx(expected)


def test_brier_score_and_log_loss_are_those_of_scikit_learn() -> None:
    sure, right = simulated()
    assert measures.brier(sure, right) == pytest.approx(brier_score_loss(right, sure))
    assert measures.log_loss(sure, right) == pytest.approx(sklearn_log_loss(right, sure))


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (190, 200), (1, 1)])
def test_intervals_are_those_of_scipy(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert measures.wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_values_that_are_right_only_together_count_as_one() -> None:
    lines = [(4, 4)] * 30 + [(0, 4)] * 10
    assert measures.wilson_of_lines(lines) == pytest.approx(measures.wilson(30, 40))
    # One value of each line, and none at all, are plain counts; what all lines have tells nothing of lines.
    assert measures.wilson_of_lines([(1, 1)] * 30 + [(0, 1)] * 10) == measures.wilson(30, 40)
    assert measures.wilson_of_lines([]) == (0.0, 1.0)
    assert measures.wilson_of_lines([(5, 5)] * 40) == measures.wilson(40, 40)
    assert measures.wilson_of_lines([(3, 5)]) == measures.wilson(0.6, 1)
    # Lines that are more alike than chance would have them do not count as more than their values.
    assert measures.wilson_of_lines([(1, 2)] * 40) == measures.wilson(40, 80)


def test_the_width_for_lines_is_that_of_scipys_bootstrap_over_lines() -> None:
    dice = np.random.default_rng(1)
    sizes = dice.integers(1, 8, 400)
    right = dice.binomial(sizes, dice.beta(2, 1, 400))
    drawn = bootstrap(
        (right, sizes),
        lambda hits, values, axis: hits.sum(axis) / values.sum(axis),
        n_resamples=2000, paired=True, vectorized=True, method="percentile", rng=3,
    ).confidence_interval  # fmt: skip
    low, high = measures.wilson_of_lines(list(zip(right.tolist(), sizes.tolist(), strict=True)))
    assert high - low == pytest.approx(drawn.high - drawn.low, rel=0.06)


def test_the_interval_of_lines_holds_the_truth_where_that_of_values_does_not() -> None:
    dice = np.random.default_rng(2)
    held = [0, 0]
    for _ in range(400):
        shares = dice.beta(1.5, 0.5, 60)
        sizes = dice.integers(1, 12, 60)
        lines = [(int(dice.binomial(size, share)), int(size)) for size, share in zip(sizes, shares, strict=True)]
        whole = tuple(map(sum, zip(*lines, strict=True)))
        for place, (low, high) in enumerate((measures.wilson_of_lines(lines), measures.wilson(*whole))):
            held[place] += low <= 0.75 <= high
    assert held[0] >= 0.92 * 400
    assert held[1] < 0.85 * 400


def test_a_confidence_that_is_true_has_a_small_error_and_one_that_is_not_a_large_one() -> None:
    assert measures.ece(*simulated(20_000)) < 0.01
    # The mean of p - p ** 2 under beta(2, 1), which is 2 / 3 - 1 / 2.
    assert measures.ece(*simulated(20_000, power=2.0)) == pytest.approx(1 / 6, abs=0.01)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(60):
        sure, right = simulated(300, seed)
        low, high = measures.bootstrap(measures.brier, sure, right, rounds=200)
        # The mean of p (1 - p) under beta(2, 1).
        held += low <= 1 / 6 <= high
    assert 50 <= held <= 60


def test_an_interval_is_the_same_each_time_and_wider_where_answers_hang_together() -> None:
    sure, right = simulated(200)
    twice = np.repeat(sure, 4), np.repeat(right, 4)
    groups = [place // 4 for place in range(800)]
    alone = measures.bootstrap(measures.brier, *twice)
    together = measures.bootstrap(measures.brier, *twice, groups)
    assert measures.bootstrap(measures.brier, *twice) == alone
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_the_coverage_curve_counts_what_is_told() -> None:
    sure, right = np.array([0.9, 0.5, 0.9, 0.7]), np.array([1.0, 0.0, 0.0, 1.0])
    told = [(one.threshold, one.coverage, one.precision) for one in measures.coverage_curve(sure, right)]
    assert told == [(0.9, 0.5, 0.5), (0.7, 0.75, pytest.approx(2 / 3)), (0.5, 1.0, 0.5)]
    assert measures.kept_at(sure, right, 0.7).count == 3
    assert measures.kept_at(sure, right, 0.95).coverage == 0.0


@pytest.mark.parametrize("precision", [0.8, 0.9])
def test_a_threshold_for_a_precision_holds_as_often_as_it_says(precision: float) -> None:
    held = []
    for seed in range(100):
        found = measures.threshold_at(*simulated(1000, seed), precision)
        assert found is not None
        # The mean of what beta(2, 1) has from the threshold on: the true share of right answers.
        least = found.threshold
        held.append(2 / 3 * (1 - least**3) / (1 - least**2) >= precision)
    assert np.mean(held) >= 0.9


def test_a_precision_that_no_label_bears_out_has_no_threshold() -> None:
    sure, right = simulated(30)
    assert measures.threshold_at(sure, right, 0.99) is None
