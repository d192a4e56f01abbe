"""The retry policy: number of retries and the delay before each.

The defaults are the openai client's (0.5 s doubling to 8 s, a quarter of it random, `Retry-After` up to two minutes),
so that moving to qvl does not change the load of an endpoint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from qvl.errors import ConfigError

LONGEST_RETRY_AFTER: Final = 120.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of retries: `max_retries` further rounds after the first; delays in seconds."""

    max_retries: int = 2
    first_delay: float = 0.5
    longest_delay: float = 8.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.max_retries <= 100:
            raise ConfigError(f"max_retries={self.max_retries} is out of range", hint="0 to 100", param="max_retries")

    def delay(self, attempt: int, retry_after: float | None = None, *, rng: random.Random | None = None) -> float:
        """Return the seconds before attempt `attempt + 1`: `retry_after` if set, else exponential up to a maximum."""
        chance = (rng or random).random()
        if retry_after is not None:
            # A little later than asked, so that clients that were refused together do not return together.
            return min(retry_after, LONGEST_RETRY_AFTER) * (1 + 0.1 * chance)
        return min(self.longest_delay, self.first_delay * 2.0 ** min(attempt, 32)) * (1 - self.jitter * chance)


def read_retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return the seconds in `retry-after-ms` or `retry-after` (seconds or an HTTP date); None without these headers.

    `headers` must be case-insensitive or in lower case. A date in the past is 0.
    """
    with suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    raw = headers.get("retry-after")
    if raw is None:
        return None
    try:
        seconds = float(raw)
    except ValueError:
        try:
            when = parsedate_to_datetime(raw)
        except (TypeError, ValueError):
            return None
        seconds = when.timestamp() - (time.time() if now is None else now)
    return max(0.0, seconds) if seconds == seconds else None
