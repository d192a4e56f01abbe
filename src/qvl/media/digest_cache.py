"""Keeps recent pictures: equal bytes are compared instead of hashed and verified again.

Several questions about one picture are the rule, and comparing takes a twentieth of hashing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final, TypeAlias

SAMPLES: Final = 64
# Hashed in less time than a change of thread takes.
FEW: Final = 64 * 1024
_Sample: TypeAlias = tuple[int, bytes]


class Encoded:
    """Encoded bytes, their hash, and a flag that they were verified to be decodable."""

    __slots__ = ("_sha256", "data", "sound")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sound = False
        self._sha256 = ""

    @property
    def hashed(self) -> bool:
        """True if `sha256` returns immediately: it is known, or that of few bytes."""
        return bool(self._sha256) or len(self.data) <= FEW

    @property
    def sha256(self) -> str:
        """`sha256:` and the hex digest of the bytes, computed on first use."""
        if not self._sha256:
            self._sha256 = f"sha256:{hashlib.sha256(self.data).hexdigest()}"
        return self._sha256


class DigestCache:
    """LRU cache of pictures with their hashes. Thread-safe.

    Args:
        max_bytes: most bytes of pictures kept; one that takes more than half of it is not kept.
    """

    def __init__(self, max_bytes: int = 16 * 2**20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[_Sample, Encoded] = OrderedDict()
        self._bytes = 0

    def encoded(self, data: bytes) -> Encoded:
        """Return `data` with its hash; the earlier object if equal bytes are still in the cache."""
        # A few bytes find the candidate, all of them decide.
        sample = _sample(data)
        with self._lock:
            known = self._entries.get(sample)
            if known is not None:
                self._entries.move_to_end(sample)
        if known is not None and known.data == data:
            return known
        made = Encoded(data)
        if len(data) <= self._max_bytes // 2:
            self._hold(sample, made)
        return made

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _hold(self, sample: _Sample, made: Encoded) -> None:
        with self._lock:
            if (before := self._entries.pop(sample, None)) is not None:
                self._bytes -= len(before.data)
            self._entries[sample] = made
            self._bytes += len(made.data)
            while self._bytes > self._max_bytes:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= len(gone.data)


def _sample(data: bytes) -> _Sample:
    return len(data), data[:: max(1, len(data) // SAMPLES)]
