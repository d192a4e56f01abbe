"""Budgets: how far two deployments may part, and whether so many cases decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from qvl.errors import ConfigError
from qvl.evaluation.agreement import LEAST_VALUES, Counted, cases_for_share, cases_to_meet
from qvl.suggest import nearest

if TYPE_CHECKING:
    from qvl.evaluation.measures import Interval

Standing: TypeAlias = Literal["within", "beyond", "undecided"]
SHARES: Final = ("text", "token", "fields", "decisions", "answered")
_HINT: Final = "text=0.98,field.brand=0.995,kl=0.01"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One budget judged: what was measured, where it lies with 95 %, and what would decide it."""

    name: str
    budget: float
    measured: float
    interval: Interval
    cases: int
    standing: Standing
    why: str = ""

    def told(self) -> str:
        """Return what was measured, and where it lies, in words."""
        return f"{self.measured:.4g}, {ends_told(self.interval)}" if self.cases else "not measured"


def ends_told(interval: Interval) -> str:
    """Return an interval in words."""
    low, high = interval
    return f"95 % from {low:.4g} to {high:.4g}" if math.isfinite(high) else "too few cases for an interval"


@dataclass(frozen=True, slots=True)
class Budgets:
    """The least shares of agreement, and the largest mean divergence `kl` of the first token in nats.

    `shares` has "text" (the whole text), "token" (the likeliest first token), "fields" (all fields of an analysis),
    "field.NAME", "decisions" (all questions), "decision.NAME" and "answered".

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    shares: Mapping[str, float]
    kl: float | None = None

    def __post_init__(self) -> None:
        for name, least in self.shares.items():
            if name not in SHARES and not name.startswith(("field.", "decision.")):
                known = (*SHARES, "kl", "field.NAME", "decision.NAME")
                raise ConfigError(f"unknown budget {name!r}", hint=nearest(name, known))
            if not 0.0 < least <= 1.0:
                raise ConfigError(f"budget {name}={least:g} is not a share", hint="above 0, at most 1")
        if self.kl is not None and not 0.0 < self.kl < math.inf:
            raise ConfigError(f"budget kl={self.kl:g} is out of range", hint="above 0, in nats")

    @classmethod
    def read(cls, texts: Sequence[str]) -> Budgets:
        """Return the budgets of texts such as `text=0.98,kl=0.01`.

        Raises:
            ConfigError: a text that cannot be read, or one name twice.
        """
        shares: dict[str, float] = {}
        for text in (part.strip() for whole in texts for part in whole.split(",")):
            # The last one, since a question may have one too.
            name, _, number = text.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if not name or math.isnan(value):
                raise ConfigError(f"--budget {text!r} cannot be read", hint=_HINT)
            if name in shares:
                raise ConfigError(f"--budget names {name} twice", hint="name each once")
            shares[name] = value
        kl = shares.pop("kl", None)
        return cls(shares, kl)

    def __bool__(self) -> bool:
        return bool(self.shares) or self.kl is not None

    def judge(
        self,
        measured: Mapping[str, Counted],
        kl: tuple[float, Interval, int] | None,
        noise: str = "",
        failed: tuple[int, int] = (0, 0),
    ) -> list[Verdict]:
        """Return the verdict on each budget.

        Args:
            measured: the agreement by measure.
            kl: (mean, interval, cases).
            noise: why nothing can be decided.
            failed: how many cases have no answer of (both sides, one side alone). One of the latter is beyond what is
                allowed, unless there is a budget of "answered".

        Raises:
            ConfigError: a budget of something that was not measured; the nearest is named.
        """
        found = []
        if self and failed[1] and "answered" not in self.shares:
            answered = measured["answered"]
            why = f"{failed[1]} of {answered.count} cases have an answer of one side alone; answered=0.99 allows 1 %"
            found.append(Verdict("answered", 1.0, answered.share, answered.interval, answered.count, "beyond", why))
        for name, least in self.shares.items():
            kind = name.partition(".")[0]
            if name not in measured and any(failed) and not any(other.startswith(kind) for other in measured):
                # It may be what the failed cases would have measured.
                found.append(_share(name, least, Counted.of(0, 0), noise))
                continue
            if name not in measured:
                what = f"budget {name!r}: no case measures it"
                raise ConfigError(what, hint=nearest(name, measured) if measured else "see --questions and --analyze")
            found.append(_share(name, least, measured[name], noise))
        if self.kl is not None:
            if kl is None and any(failed):
                kl = math.nan, (0.0, math.inf), 0
            if kl is None:
                raise ConfigError("budget 'kl': a side tells no log-probabilities", hint="leave it out")
            found.append(_divergence(self.kl, *kl, noise))
        return found


def _share(name: str, least: float, counted: Counted, noise: str) -> Verdict:
    low, high = counted.interval
    standing: Standing = "within" if low >= least else "beyond" if high < least else "undecided"
    why = ""
    if least == 1.0:
        # No number of cases shows that nothing at all differs; what is asked for is that none did.
        standing = "within" if counted.count and counted.agree == counted.count else "beyond"
    if not counted.count:
        standing, why = "undecided", "no case that both sides answered measures it"
    elif standing == "undecided":
        more = cases_for_share(least, counted.share)
        why = (
            f"about {more} cases would decide it" if more else "it lies too near to the budget for any number of cases"
        )
    if noise and standing != "within":
        standing, why = "undecided", noise
    return Verdict(name, least, counted.share, counted.interval, counted.count, standing, why)


def _divergence(most: float, mean: float, interval: Interval, cases: int, noise: str) -> Verdict:
    low, high = interval
    standing: Standing = "within" if high <= most else "beyond" if low > most else "undecided"
    # Whatever interval the cases at hand have, a kind of case that none of them is of can lie beyond it: so many meet
    # one whose first token is 1 nat apart, if there are enough such cases to reach the budget.
    enough = max(LEAST_VALUES, cases_to_meet(min(most, 0.5)))
    why = "" if standing != "undecided" else "more cases would narrow the interval"
    if cases < LEAST_VALUES or (standing != "beyond" and cases < enough):
        standing, why = "undecided", f"at least {enough} cases are needed"
    if noise and standing != "within":
        standing, why = "undecided", noise
    return Verdict("kl", most, mean, interval, cases, standing, why)
