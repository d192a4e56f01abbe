"""Fits curves from raw confidences to how often answers are right, by scikit-learn; chosen by held-out log loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.calibration.curve import Curve, IsotonicCurve, PlattCurve, logit
from qvl.errors import MissingDependencyError
from qvl.suggest import install_line

if TYPE_CHECKING:
    from qvl.evaluation.measures import Numbers

LEAST_LABELS: Final = 50
"""Of one field or question. Below, intervals are wider than what a threshold would have to tell apart."""
FOLDS: Final = 5
METHODS: Final = ("platt", "isotonic")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The chosen curve, the held-out log loss of each method, and the held-out confidence of each label.

    Held out: told by a curve that was fitted and chosen without the label's picture.
    """

    curve: Curve
    log_loss: dict[str, float]
    held_out: Numbers


def check_installed() -> None:
    """Raise MissingDependencyError unless scikit-learn is installed."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as exc:
        what = f"qvl calibrate needs the package {exc.name!r} (scikit-learn)"
        raise MissingDependencyError(what, hint=install_line("calibrate")) from exc


def fit(raw: Numbers, right: Numbers, groups: Sequence[int]) -> Fitted:
    """Return the fitted curve of answers with `raw` confidences, of which those with `right` 1 are right.

    `groups` tells the picture of each; what is held out of a fold is whole pictures.
    """
    import numpy as np

    held_out = np.zeros(len(raw))
    for train, test in _folds(groups):
        # The method is chosen anew within what is fitted, or the choice would have seen what is held out.
        inner = _losses(raw[train], right[train], [groups[place] for place in train])
        held_out[test] = applied(fit_curve(_best(inner), raw[train], right[train]), raw[test])
    losses = _losses(raw, right, groups)
    return Fitted(fit_curve(_best(losses), raw, right), losses, held_out)


def _best(losses: dict[str, float]) -> str:
    return min(losses, key=losses.__getitem__)


def _losses(raw: Numbers, right: Numbers, groups: Sequence[int]) -> dict[str, float]:
    """Return the log loss of each method on what its curve was fitted without."""
    import numpy as np

    from qvl.evaluation.measures import log_loss

    found = {}
    for method in METHODS:
        told = np.zeros(len(raw))
        for train, test in _folds(groups):
            told[test] = applied(fit_curve(method, raw[train], right[train]), raw[test])
        found[method] = log_loss(told, right)
    return found


def _folds(groups: Sequence[int]) -> list[tuple[Sequence[int], Sequence[int]]]:
    from sklearn.model_selection import GroupKFold

    folds = GroupKFold(min(FOLDS, len(set(groups))), shuffle=True, random_state=0)
    return list(folds.split(groups, groups=groups))


def applied(curve: Curve, raw: Numbers) -> Numbers:
    """Return the calibrated confidence of each raw one."""
    import numpy as np

    return np.array([curve.apply(float(one)) for one in raw])


def fit_curve(method: str, raw: Numbers, right: Numbers) -> Curve:
    """Return the curve of `method`, "isotonic" or "platt".

    No curve says 0 or 1, however many labels: it stays away from them by what one more label could change.
    """
    import numpy as np

    edge = 1.0 / (len(raw) + 2)
    hits = int(right.sum())
    if hits in (0, len(raw)):
        share = (hits + 1) * edge
        return IsotonicCurve(raw=[0.5], share=[share])
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        model = IsotonicRegression(y_min=edge, y_max=1.0 - edge, out_of_bounds="clip").fit(raw, right)
        return IsotonicCurve(raw=model.X_thresholds_.tolist(), share=model.y_thresholds_.tolist())
    from sklearn.linear_model import LogisticRegression

    logits = np.array([[logit(float(one))] for one in raw])
    model = LogisticRegression().fit(logits, right)
    slope = float(model.coef_[0, 0])
    if slope < 0.0:
        return IsotonicCurve(raw=[0.5], share=[(hits + 1) * edge])
    return PlattCurve(slope=slope, offset=float(model.intercept_[0]))
