"""A circuit breaker: a failure blocks calls for a while; then one probe is let through, and closes it on success.

A call from before the failure that fails later counts as the same failure: only failed probes make the time longer.
A call that succeeds, whenever it began, closes the circuit.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

FIRST_REST: Final = 0.25


class Circuit:
    """Closed while calls succeed, open for some time after a failure, then half-open for one probe.

    A thread that calls `enter` must call `leave` or `forgo` too.

    Args:
        longest_rest: most seconds that the circuit stays open; first a quarter of a second, then doubling, with jitter.
        clock: monotonic seconds.
    """

    def __init__(self, *, longest_rest: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest_rest = longest_rest
        self.reason = ""
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until = 0.0
        self._prober: int | None = None

    def enter(self) -> float:
        """Return 0 if the caller may proceed (and must `leave` or `forgo`), else the seconds until the next probe."""
        with self._lock:
            if not self._failures:
                return 0.0
            seconds = self._open_until - self._clock()
            if seconds > 0:
                return seconds
            if self._prober is not None:
                return FIRST_REST
            self._prober = threading.get_ident()
            return 0.0

    def leave(self, failure: str | None) -> bool:
        """Report the outcome of a call: None or the failure's reason. True if that opened or closed the circuit."""
        with self._lock:
            probed = self._end_probe()
            if failure is None:
                changed, self._failures, self.reason = self._failures > 0, 0, ""
                return changed
            if self._failures and not probed:
                return False
            self._failures += 1
            rest = min(self.longest_rest, FIRST_REST * 2 ** min(self._failures - 1, 20))
            self._open_until = self._clock() + rest * random.uniform(0.75, 1.0)
            self.reason = failure
            return self._failures == 1

    def forgo(self) -> None:
        """End a call without an outcome; the next caller may probe."""
        with self._lock:
            self._end_probe()

    def _end_probe(self) -> bool:
        """End the probe if the calling thread made it; True if it did."""
        if self._prober != threading.get_ident():
            return False
        self._prober = None
        return True

    @property
    def open(self) -> bool:
        return self._failures > 0
