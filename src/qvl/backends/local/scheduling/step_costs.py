"""The cost model of steps: seconds of decode, prompts and pictures, measured on the steps that ran. No torch.

Each estimate is the median of the last few measurements, so that neither a slow first step nor a pause of the machine
distorts it for long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import log2, sqrt
from statistics import median_low
from typing import Final

RECENT: Final = 15
# Of a step with several parts: where the estimates of the others leave less than this share, they are wrong.
LEAST: Final = 0.25


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a step.

    Args:
        rows: tokens of running answers; one of each sequence that decodes, more where they are known ahead.
        prompt: prompt tokens, weighted by their attention to earlier ones, in the scheduler's unit.
        pictures: work on pictures, in the same unit.
    """

    rows: int = 0
    prompt: float = 0.0
    pictures: float = 0.0


@dataclass(frozen=True, slots=True)
class StepParts:
    """Seconds of a step, by part."""

    decode: float = 0.0
    prompt: float = 0.0
    pictures: float = 0.0

    @property
    def total(self) -> float:
        return self.decode + self.prompt + self.pictures

    def __add__(self, other: StepParts) -> StepParts:
        return StepParts(self.decode + other.decode, self.prompt + other.prompt, self.pictures + other.pictures)

    def scaled_to(self, total: float) -> StepParts:
        """Return parts in the same proportion that sum up to `total`; nothing if there are none."""
        scale = total / self.total if self.total else 0.0
        return StepParts(self.decode * scale, self.prompt * scale, self.pictures * scale)


class _Recent:
    """The median of the last few values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=RECENT)
        self.median: float | None = None

    def add(self, value: float) -> None:
        self._values.append(value)
        self.median = median_low(self._values)


class StepCosts:
    """Estimates: seconds of a decode step by its rows, and of a unit of prompts and of pictures."""

    def __init__(self) -> None:
        self._decode: dict[int, tuple[_Recent, _Recent]] = {}  # rows and seconds, by size class
        self._points: list[tuple[float, float]] = []
        self._prompt = _Recent()
        self._pictures = _Recent()

    @property
    def prompt(self) -> float | None:
        """Return the seconds of a unit of prompts; of pictures while only those were measured, else None."""
        return self._prompt.median if self._prompt.median is not None else self._pictures.median

    @property
    def pictures(self) -> float | None:
        """Return the seconds of a unit of pictures; of prompts while only those were measured, else None."""
        return self._pictures.median if self._pictures.median is not None else self._prompt.median

    def decode(self, rows: int) -> float | None:
        """Return the seconds of a decode step of `rows` sequences; None before any was measured."""
        if not rows:
            return 0.0
        if not self._points:
            return None
        lower: tuple[float, float] | None = None
        for some, seconds in self._points:
            if some >= rows:
                if lower is None:
                    return seconds
                return lower[1] + (seconds - lower[1]) * (rows - lower[0]) / (some - lower[0])
            lower = (some, seconds)
        assert lower is not None
        # More rows than were measured: between no more and proportionally more.
        return lower[1] * sqrt(rows / lower[0])

    def parts(self, work: Work) -> StepParts:
        """Return the estimated seconds of `work`; a part that was never measured counts 0."""
        return StepParts(
            self.decode(work.rows) or 0.0, work.prompt * (self.prompt or 0.0), work.pictures * (self.pictures or 0.0)
        )

    def observe(self, work: Work, seconds: float) -> None:
        """Update the estimate of the largest part of `work`: `seconds` less the estimates of the other parts."""
        expected: dict[str, float | None] = {}
        if work.rows:
            expected["decode"] = self.decode(work.rows)
        if work.prompt:
            expected["prompt"] = self._times(work.prompt, self._prompt.median)
        if work.pictures:
            expected["pictures"] = self._times(work.pictures, self._pictures.median)
        unknown = [part for part, value in expected.items() if value is None]
        known = sum(value or 0.0 for value in expected.values())
        if unknown == ["prompt", "pictures"]:
            # Until they are measured apart, a unit of either costs the same.
            both = max(seconds - known, LEAST * seconds) / (work.prompt + work.pictures)
            self._prompt.add(both)
            self._pictures.add(both)
        elif expected and len(unknown) < 2:
            part = unknown[0] if unknown else max(expected, key=lambda name: expected[name] or 0.0)
            rest = seconds - known + (expected[part] or 0.0)
            self._learn(part, work, max(rest, LEAST * (expected[part] or seconds)))

    @staticmethod
    def _times(amount: float, price: float | None) -> float | None:
        return None if price is None else amount * price

    def _learn(self, part: str, work: Work, seconds: float) -> None:
        if part == "prompt":
            self._prompt.add(seconds / work.prompt)
        elif part == "pictures":
            self._pictures.add(seconds / work.pictures)
        else:
            rows, times = self._decode.setdefault(round(4 * log2(work.rows)), (_Recent(), _Recent()))
            rows.add(work.rows)
            times.add(seconds)
            self._points = sorted((r.median or 0.0, t.median or 0.0) for r, t in self._decode.values())
