"""Which tokens can begin a text, for reading the probability of whole words from that of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence


class TokenTable:
    """The tokens of a model by their bytes.

    Args:
        tokens: (id, bytes) of every token that writes text.
        ends: the tokens that end an answer, and their names.
    """

    def __init__(self, tokens: Iterable[tuple[int, bytes]], ends: Iterable[tuple[int, str]]) -> None:
        by_bytes: dict[bytes, list[int]] = defaultdict(list)
        for token, data in tokens:
            if data:
                by_bytes[data].append(token)
        self._by_bytes = dict(by_bytes)
        self._longest = max(map(len, self._by_bytes), default=0)
        self.ends = dict(ends)

    def ids(self, text: str, data: bytes) -> Sequence[int]:
        """Return the tokens that write `data`, or for no bytes the token that ends an answer and is named `text`."""
        if data:
            return self._by_bytes.get(data, ())
        return [token for token, name in self.ends.items() if name == text]

    def beginnings(self, text: bytes) -> Sequence[tuple[int, bytes]]:
        """Return (id, bytes) of every token whose bytes begin `text`, the shortest first."""
        return [
            (token, text[:size])
            for size in range(1, min(len(text), self._longest) + 1)
            for token in self._by_bytes.get(text[:size], ())
        ]
