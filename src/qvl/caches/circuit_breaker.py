"""A circuit breaker: after a failure, nobody asks for a while; then one asks, and all follow when that went well.

What was asked before the failure and fails after it is the same failure: the rest grows with probes alone. What goes
well, whenever it was asked, ends the rest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

FIRST_REST: Final = 0.25


class Circuit:
    """Closed while things go well, open for a rest after a failure, half-open for one probe after the rest.

    Who enters has to leave in the same thread.

    Args:
        longest_rest: seconds; rests double from a quarter of a second up to this, with jitter.
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
        """0 when the caller may ask, and then has to `leave` or `forgo`; else the seconds left until somebody may."""
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
        """Tells how the asking ended: None well, else why it failed. Returns whether that opened or closed it."""
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
        """Ends an asking that told nothing; the next one may probe."""
        with self._lock:
            self._end_probe()

    def _end_probe(self) -> bool:
        """Whether the caller was the one who probed."""
        if self._prober != threading.get_ident():
            return False
        self._prober = None
        return True

    @property
    def open(self) -> bool:
        return self._failures > 0
