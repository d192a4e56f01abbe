"""Curves: applied without a library, they give what scikit-learn gives."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from qvl.calibration.curve import IsotonicCurve, PlattCurve, logit
from qvl.evaluation.fit import fit_curve


def simulated(count: int = 800, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Raw confidences, and what is right with the probability raw ** 3."""
    dice = np.random.default_rng(seed)
    raw = dice.uniform(0, 1, count)
    return raw, (dice.uniform(0, 1, count) < raw**3).astype(float)


def test_an_isotonic_curve_says_what_scikit_learn_predicts() -> None:
    raw, right = simulated()
    edge = 1 / (len(raw) + 2)
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(raw, right)
    curve = fit_curve("isotonic", raw, right)
    asked = np.concatenate([np.linspace(0, 1, 301), raw])
    assert np.allclose([curve.apply(float(one)) for one in asked], model.predict(asked), atol=1e-12)


def test_a_platt_curve_says_what_scikit_learn_predicts() -> None:
    raw, right = simulated()
    curve = fit_curve("platt", raw, right)
    assert isinstance(curve, PlattCurve)
    model = LogisticRegression().fit([[logit(one)] for one in raw], right)
    asked = np.linspace(0.001, 0.999, 301)
    expected = model.predict_proba([[logit(one)] for one in asked])[:, 1]
    assert np.allclose([curve.apply(float(one)) for one in asked], expected, atol=1e-12)


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_a_curve_never_falls_and_never_says_0_or_1(method: str) -> None:
    curve = fit_curve(method, *simulated())
    told = [curve.apply(float(one)) for one in np.linspace(0, 1, 500)]
    assert all(0 < a <= b < 1 for a, b in itertools.pairwise(told))


@pytest.mark.parametrize("method", ["isotonic", "platt"])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_answers_that_are_all_right_or_all_wrong_have_a_confidence_that_one_more_could_change(
    method: str, right: float
) -> None:
    curve = fit_curve(method, np.linspace(0, 1, 98), np.full(98, right))
    assert curve.apply(0.3) == curve.apply(0.9) == pytest.approx((98 * right + 1) / 100)


def test_a_confidence_that_is_higher_for_wrong_answers_says_nothing() -> None:
    raw, right = simulated()
    told = fit_curve("platt", 1 - raw, right)
    assert told.apply(0.1) == told.apply(0.9) == pytest.approx(right.mean(), abs=0.01)


@pytest.mark.parametrize("raw", [0.0, 1.0, 1e-300, 1 - 1e-16])
def test_the_ends_do_not_overflow(raw: float) -> None:
    assert 0 <= PlattCurve(slope=1e6, offset=-3.0).apply(raw) <= 1


@pytest.mark.parametrize(
    ("raw", "share"),
    [
        ([0.2, 0.1], [0.1, 0.2]),
        ([0.1, 0.2], [0.3, 0.2]),
        ([0.1], [0.1, 0.2]),
        ([], []),
        ([0.1, 0.2], [0.3, float("nan")]),
    ],
)
def test_points_that_make_no_curve_are_refused(raw: list[float], share: list[float]) -> None:
    with pytest.raises(ValidationError):
        IsotonicCurve(raw=raw, share=share)


def test_applying_needs_no_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['scipy'] = None\n"
        "from qvl import Pipeline\nfrom qvl.calibration.calibrator import Calibrator\n"
        "from qvl.calibration.curve import PlattCurve\nprint(PlattCurve(slope=1.0, offset=0.0).apply(0.5))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "0.5", ran.stderr
