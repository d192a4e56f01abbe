"""Pictures that were here a moment ago are neither hashed nor checked again: their bytes are compared instead.

Several questions about one picture are the rule, and comparing takes a twentieth of hashing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final, TypeAlias

SAMPLES: Final = 64
_Sample: TypeAlias = tuple[int, bytes]


class Encoded:
    """Encoded bytes, their hash, and whether it is known that a decoder reads them."""

    __slots__ = ("data", "sha256", "sound")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sha256 = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.sound = False


class DigestCache:
    """Remembers what was hashed of late. Safe for many threads.

    Args:
        max_bytes: of pictures that are held for it; the least recently seen goes first, and what takes more than half
            of it is not held at all.
    """

    def __init__(self, max_bytes: int = 16 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[_Sample, Encoded] = OrderedDict()
        self._bytes = 0

    def encoded(self, data: bytes) -> Encoded:
        """`data` with its hash: what was made of equal bytes before, where that is still held."""
        # A few bytes find the candidate, all of them decide.
        sample = (len(data), data[:: max(1, len(data) // SAMPLES)])
        with self._lock:
            known = self._held.get(sample)
            if known is not None:
                self._held.move_to_end(sample)
        if known is not None and known.data == data:
            return known
        made = Encoded(data)
        if len(data) <= self._max_bytes // 2:
            self._hold(sample, made)
        return made

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _hold(self, sample: _Sample, made: Encoded) -> None:
        with self._lock:
            if (before := self._held.pop(sample, None)) is not None:
                self._bytes -= len(before.data)
            self._held[sample] = made
            self._bytes += len(made.data)
            while self._bytes > self._max_bytes:
                _, gone = self._held.popitem(last=False)
                self._bytes -= len(gone.data)
