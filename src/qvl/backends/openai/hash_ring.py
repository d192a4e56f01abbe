"""Consistent hashing: equal pictures go to the same endpoint, and few move when the set of endpoints changes.

Karger et al. 1997; points on a circle, as in ketama.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final

POINTS: Final = 64


class HashRing:
    """A hash ring on which the number of points of each name is `POINTS` times its weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        points = sorted(
            (_point(f"{name}#{number}"), name)
            for name, weight in weights.items()
            for number in range(max(1, round(POINTS * weight)))
        )
        self._points = [point for point, _ in points]
        self._owners = [name for _, name in points]
        self._names = len(weights)

    def order(self, key: str) -> Iterator[str]:
        """Yield every name once: the owner of `key`, then its next owners on the ring."""
        if not self._points:
            return
        start = bisect_left(self._points, _point(key))
        names: set[str] = set()
        for step in range(len(self._points)):
            name = self._owners[(start + step) % len(self._points)]
            if name not in names:
                names.add(name)
                yield name
                if len(names) == self._names:
                    return


def _point(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
