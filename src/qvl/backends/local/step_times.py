"""Measures the engine's steps, for the cost model and for the statistics."""

from __future__ import annotations

import time
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

from qvl.backends.local.scheduling.step_costs import StepCosts, StepParts, Work

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qvl.backends.local.scheduling.scheduler import Scheduler


class StepTimes:
    """Measures each step between `start` and `end`.

    Args:
        costs: the cost model to update.
        asynchronous: the device computes later than the host says. Only a step that samples waits for it, so what was
            queued since the last such step is measured as one; else pictures and the forward pass are measured apart.
    """

    def __init__(self, costs: StepCosts, *, asynchronous: bool) -> None:
        self._costs = costs
        self._asynchronous = asynchronous
        self._began = self._parted = 0.0
        self._queued = Work()
        self._last = StepParts()
        self._total = StepParts()

    def start(self) -> None:
        """Begin a step."""
        self._parted = time.perf_counter()
        if self._queued == Work():
            self._began = self._parted

    def pictures(self, units: float) -> None:
        """Record that pictures of the cost `units` were encoded since the start of the step."""
        self._queued = replace(self._queued, pictures=self._queued.pictures + units)
        if units and not self._asynchronous:
            self._costs.observe(Work(pictures=units), time.perf_counter() - self._began)
            self._parted = time.perf_counter()

    def end(self, forward: Work, *, sampled: bool) -> None:
        """End the step, whose forward pass was `forward`, and update estimates and totals."""
        now = time.perf_counter()
        queued = Work(forward.rows, self._queued.prompt + forward.prompt, self._queued.pictures)
        if self._asynchronous and not sampled:
            self._queued = queued
            return
        if self._asynchronous:
            self._costs.observe(queued, now - self._began)
        else:
            self._costs.observe(forward, now - self._parted)
        self._queued = Work()
        self._last = self._costs.parts(queued).scaled_to(now - self._began)
        self._total = self._total + self._last

    def stats(self, scheduler: Scheduler) -> Mapping[str, float]:
        """Return totals of all steps, the last step, its budget (0: unbounded) and the estimated costs, in seconds."""
        costs, budget = self._costs, scheduler.budget
        return {
            "step_seconds_total": self._total.total,
            "step_decode_seconds_total": self._total.decode,
            "step_prompt_seconds_total": self._total.prompt,
            "step_picture_seconds_total": self._total.pictures,
            "step_seconds": self._last.total,
            "step_budget_seconds": budget.seconds if isfinite(budget.seconds) else 0.0,
            "step_decode_seconds": self._last.decode,
            "step_prompt_seconds": self._last.prompt,
            "step_picture_seconds": self._last.pictures,
            "cost_decode_step_seconds": costs.decode(scheduler.max_num_seqs) or 0.0,
            "cost_prompt_token_seconds": costs.prompt or 0.0,
            "cost_picture_unit_seconds": costs.pictures or 0.0,
        }
