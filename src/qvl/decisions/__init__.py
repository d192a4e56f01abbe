"""Questions with a fixed set of answers, and the probability of each: what `Pipeline.decide` takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.decisions.answers import Decision, Decisions
    from qvl.decisions.questions import ChoiceQuestion, Level, Option, Predicate, Score

    Choice = ChoiceQuestion

__all__ = ["Choice", "Decision", "Decisions", "Level", "Option", "Predicate", "Score"]
__getattr__ = lazy(
    __name__,
    {
        "qvl.decisions.answers": ("Decision", "Decisions"),
        "qvl.decisions.questions": ("Choice", "Level", "Option", "Predicate", "Score"),
    },
)
