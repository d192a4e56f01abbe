"""The validated plan of a run's load."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypedDict

from qvl.backends.openai.retry import RetryPolicy
from qvl.errors import ConfigError

SLO_NAMES: Final = ("ttft", "tpot", "itl", "e2e")
MOST_IN_FLIGHT: Final = 1024
FEWEST_A_LEVEL: Final = 32


class PlanFacts(TypedDict):
    """A LoadPlan as JSON values."""

    concurrency: int
    rate: float | None
    arrival: str | None
    ramp: float
    adaptive: bool
    sweep: bool
    count: int | None
    duration: float | None
    warmup: int
    max_retries: int
    timeout: float
    seed: int
    slo: dict[str, float]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The load on an endpoint. Times are seconds, rates requests a second.

    Args:
        concurrency: clients of the closed loop; the most requests in flight with `rate` or `adaptive`.
        rate: open loop at this mean rate; latency counts from the intended start of a request.
        arrival: the gaps of the open loop: `poisson` or `constant`.
        ramp: seconds in which the clients start or the rate rises; their requests are not in the figures.
        adaptive: the limit of requests in flight starts at 1, rises by one on success, is halved on overload.
        sweep: run level after level of clients (1, 2, 4, ... `concurrency`) until throughput no longer grows.
        count: the number of requests (per endpoint and level); None: every item of the input once.
        duration: seconds after which no more requests are sent; the input is repeated.
        warmup: requests before the first measured one, per endpoint, about pictures that are not in the input.
        slo: upper bounds in seconds for goodput, by `ttft`, `tpot`, `itl`, `e2e`.

    Raises:
        ConfigError: a value is out of range, or options exclude each other.
    """

    concurrency: int = 1
    rate: float | None = None
    arrival: Literal["poisson", "constant"] = "poisson"
    ramp: float = 0.0
    adaptive: bool = False
    sweep: bool = False
    count: int | None = None
    duration: float | None = None
    warmup: int = 0
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float = 600.0
    seed: int = 0
    slo: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need(1 <= self.concurrency <= 65_536, f"concurrency={self.concurrency}", "1 to 65536")
        _need(self.rate is None or 0 < self.rate <= 1e6, f"rate={self.rate}", "above 0")
        _need(self.arrival in ("poisson", "constant"), f"arrival={self.arrival!r}", "poisson or constant")
        _need(self.ramp >= 0, f"ramp={self.ramp}", "0 or more seconds")
        _need(self.count is None or self.count >= 1, f"count={self.count}", "1 or more")
        _need(self.duration is None or self.duration > 0, f"duration={self.duration}", "above 0 seconds")
        _need(self.warmup >= 0, f"warmup={self.warmup}", "0 or more")
        _need(self.timeout > 0, f"timeout={self.timeout}", "above 0 seconds")
        chosen = [name for name in ("rate", "adaptive", "sweep") if getattr(self, name)]
        _need(len(chosen) < 2, f"{' and '.join(chosen)} together", "choose one kind of load")
        _need(not (self.sweep and self.ramp), "sweep and ramp together", "leave --ramp out")

    def levels(self) -> list[int]:
        """Return the numbers of clients of a sweep: doubling up to `concurrency`."""
        levels = [1]
        while levels[-1] * 2 < self.concurrency:
            levels.append(levels[-1] * 2)
        return levels if levels[-1] == self.concurrency else [*levels, self.concurrency]

    def block(self) -> int:
        """Return the number of requests that one endpoint gets before the run switches to the next."""
        if self.rate is not None:
            return max(16, round(self.rate * 5))
        return 1 if self.concurrency == 1 else 4 * self.concurrency

    def arrivals(self, part: int = 0, *, ramp: float | None = None) -> Iterator[float]:
        """Yield the intended send times of the open loop in seconds after the start, endlessly; `part` seeds them.

        During the ramp the rate rises linearly from 0 (a Poisson process is then not stationary: its gaps are
        stretched, equivalent to thinning).
        """
        assert self.rate is not None
        dice = random.Random(f"arrivals-{self.seed}-{part}")
        ramp = self.ramp if ramp is None else ramp
        load = 0.0
        while True:
            yield self._when(load, ramp)
            load += dice.expovariate(1.0) if self.arrival == "poisson" else 1.0

    def _when(self, load: float, ramp: float) -> float:
        """Return the time at which the expected number of requests reaches `load`."""
        assert self.rate is not None
        at_end_of_ramp = self.rate * ramp / 2
        if load < at_end_of_ramp:
            return float((2 * load * ramp / self.rate) ** 0.5)
        return ramp + (load - at_end_of_ramp) / self.rate

    def facts(self) -> PlanFacts:
        """Return the plan as JSON values."""
        return {
            "concurrency": self.concurrency,
            "rate": self.rate,
            "arrival": self.arrival if self.rate else None,
            "ramp": self.ramp,
            "adaptive": self.adaptive,
            "sweep": self.sweep,
            "count": self.count,
            "duration": self.duration,
            "warmup": self.warmup,
            "max_retries": self.retries.max_retries,
            "timeout": self.timeout,
            "seed": self.seed,
            "slo": dict(self.slo),
        }


def read_slo(text: str) -> dict[str, float]:
    """Return the seconds by name in a text such as `ttft=500ms,tpot=50,e2e=10s`; the default unit is ms, as in vLLM.

    Raises:
        ConfigError: an unknown name or an invalid number.
    """
    bounds = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip().lower() for part in entry.partition("="))
        scale = 0.001
        if value.endswith("ms"):
            value = value[:-2]
        elif value.endswith("s"):
            value, scale = value[:-1], 1.0
        try:
            seconds = float(value) * scale
        except ValueError:
            seconds = 0.0
        if name not in SLO_NAMES or not 0 < seconds < float("inf"):
            raise ConfigError(f"--slo {entry!r} cannot be read", hint="as ttft=500ms,tpot=50ms,e2e=10s")
        bounds[name] = seconds
    return bounds


def _need(ok: bool, setting: str, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"invalid {setting}", hint=allowed)
