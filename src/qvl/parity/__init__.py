"""Parity: where the answers of two deployments part, on your own pictures, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy as _lazy

if TYPE_CHECKING:
    from qvl.parity.budgets import Budgets
    from qvl.parity.case import Case
    from qvl.parity.comparison import acompare, compare
    from qvl.parity.report import ParityReport

__all__ = ["Budgets", "Case", "ParityReport", "acompare", "compare"]
__getattr__ = _lazy(
    __name__,
    {
        "qvl.parity.budgets": ("Budgets",),
        "qvl.parity.case": ("Case",),
        "qvl.parity.comparison": ("acompare", "compare"),
        "qvl.parity.report": ("ParityReport",),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
