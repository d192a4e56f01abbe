"""Times kernels in turns, within a bound of time, and tells whether the machine left them the processor."""

from __future__ import annotations

import time
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

ROUNDS: Final = 5
MOST_ROUNDS: Final = 20
# Seconds for one number of rows, after the first ROUNDS.
RACE_S: Final = 0.05
# A kernel that takes so many times the best one's time after the first TRIALS is not timed again.
HOPELESS: Final = 1.6
TRIALS: Final = 3
# Seconds that a process measures, all in all; and how many may be left once what it finds is not worth keeping.
MOST_SECONDS: Final = 30.0
DISTURBED_SECONDS: Final = 5.0
# Share of a call's time for which its thread must have had a processor: else others had it.
ALONE: Final = 0.9

Kernel = TypeVar("Kernel", bound="Callable[[torch.Tensor], torch.Tensor]")


class Clock:
    """Times calls for as long as this process may measure. Not thread-safe.

    Args:
        left: seconds that may be spent within `bounded`, all in all.

    Attributes:
        disturbed: True if others had the processor in every call of some kernel, since `bounded` began.
    """

    def __init__(self, left: float = MOST_SECONDS) -> None:
        self.left = left
        self.disturbed = False
        self._end = inf

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within it `go_on` and `time` raise TimeoutError once nothing is left."""
        began = time.perf_counter()
        self._end, self.disturbed = began + self.left, False
        try:
            yield
        finally:
            self.left -= time.perf_counter() - began
            self._end = inf

    def go_on(self) -> None:
        if time.perf_counter() > self._end:
            raise TimeoutError("the time for measuring is over")

    def time(self, work: Callable[[], object]) -> tuple[float, bool]:
        """Return (the seconds that `work` took, True if its thread had a processor all the time).

        If it had not, they are those for which it had: others' turns are ten times as long as a kernel's.
        """
        self.go_on()
        start, used = time.perf_counter(), time.thread_time()
        work()
        used, took = time.thread_time() - used, time.perf_counter() - start
        alone = used >= ALONE * took
        return took if alone else used, alone


clock = Clock()


def race(kernels: dict[str, list[Kernel]], x: torch.Tensor, copies: int) -> dict[str, float]:
    """Return the least milliseconds of each kernel for one call with x, of the first `copies` of it in turn.

    One that fails drops out of `kernels`. It takes RACE_S, or longer for ROUNDS.
    """
    best: dict[str, float] = {}
    alone: set[str] = set()

    def turn(name: str) -> None:
        of = kernels[name][:copies]
        took, undisturbed = clock.time(lambda: [kernel(x) for kernel in of])
        best[name] = min(best.get(name, inf), took / len(of) * 1e3)
        if undisturbed:
            alone.add(name)

    def hopeful(name: str) -> bool:
        return best[name] < HOPELESS * min(best.values())

    for name in list(kernels):
        try:
            kernels[name][0](x)
            turn(name)
        except (RuntimeError, NotImplementedError, AttributeError):
            del kernels[name]
    # In turns, so that what else the machine does meets all alike.
    end = time.perf_counter() + RACE_S
    rounds = 1
    while rounds < ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        rounds += 1
        for name in kernels:
            if rounds <= TRIALS or hopeful(name):
                turn(name)
    clock.disturbed |= any(hopeful(name) and name not in alone for name in kernels)
    return {name: round(ms, 5) for name, ms in best.items()}
