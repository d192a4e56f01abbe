"""The time budget of a step: decoding sequences wait for its end, prompts and pictures for its length. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.scheduling.step import Step
from qvl.backends.local.scheduling.step_costs import StepCosts
from qvl.errors import ConfigError

GOALS: Final = ("throughput", "latency")
# Steps over which the waiting work on prompts and pictures is spread.
HORIZON: Final = 4
# Longest step with the goal "latency", in decode steps: at most 4 in 95 of 100, since costs are estimates.
LONGEST: Final = 3.75


class StepBudget:
    """Decides how long the next step may take.

    The waiting work is spread over the next HORIZON steps: a short queue makes steps little longer than decode alone,
    a longer queue makes longer steps, until as much work is done as arrives. With the goal "latency" a step is LONGEST
    decode steps long at most, however many requests wait.

    Args:
        costs: the cost model.
        goal: "throughput" (the queue does not grow) or "latency" (the time between tokens is bounded).
        max_step_ms: longest step in milliseconds, with either goal; None leaves it to the goal.

    Attributes:
        seconds: budget of the last step; infinite if the number of its tokens alone bounds it.

    Raises:
        ConfigError: an unknown goal, or a bound that is not above 0.
    """

    def __init__(self, costs: StepCosts, goal: str = "throughput", max_step_ms: float | None = None) -> None:
        if goal not in GOALS:
            raise ConfigError(f"invalid goal={goal!r}", hint=" or ".join(GOALS), param="goal")
        if max_step_ms is not None and not 0 < max_step_ms < float("inf"):
            raise ConfigError(f"max_step_ms={max_step_ms} is out of range", hint="above 0", param="max_step_ms")
        self.costs = costs
        self.goal = goal
        self.max_step = None if max_step_ms is None else max_step_ms / 1e3
        self.seconds = float("inf")

    def describe(self) -> str:
        """Return in words what was set, such as "goal latency, steps of 20 ms at most"; empty by default."""
        goal = "" if self.goal == GOALS[0] else f"goal {self.goal}"
        return ", ".join(filter(None, (goal, f"steps of {self.max_step * 1e3:g} ms at most" if self.max_step else "")))

    def beside_decode(self, rows: int, present: int, backlog: float) -> float:
        """Return the seconds of a step that prompts and pictures may take; infinite while nothing decodes.

        Args:
            rows: sequences that decode in the step.
            present: sequences that decode or are about to.
            backlog: seconds of waiting work on prompts and pictures.
        """
        decode = self.costs.decode(rows)
        limit = float("inf") if self.max_step is None else self.max_step
        if rows and decode is not None:
            usual = max(decode, self.costs.decode(present) or 0.0)
            if self.goal == "latency" and self.max_step is None:
                limit = LONGEST * usual
            limit = min(limit, decode + max(usual, backlog / HORIZON))
        self.seconds = limit
        return limit - (decode or 0.0)


@dataclass(slots=True)
class Remaining:
    """The part of a step's budget that is not spent yet.

    Args:
        tokens: prompt tokens that the memory allows.
        units: prompt and picture work together that the time allows.
        picture_price: measured cost of a unit of picture work, in units of prompt work.
        reserved: units kept for pictures, where prompts that arrived later are concerned.
        since: place in the order of the first sequence that waits for pictures.
    """

    tokens: int
    units: float
    picture_price: float
    reserved: float
    since: tuple[float, float]

    def for_prompt(self, sequence: Sequence, step: Step, grain: int) -> float:
        """Return the units that a prompt may take: at least `grain`, or 0; the earliest one always gets `grain`."""
        earliest = sequence.order < self.since
        units = self.units if earliest else self.units - self.reserved
        if units < grain:
            units = grain if earliest and not step.has_prompt else 0.0
        # Behind a long context there is time for more than the tokens that are left, which answers may have taken all.
        return 0.0 if self.tokens < (grain if step.has_prompt else 1) else units
