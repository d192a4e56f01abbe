"""How many of an answer's tokens are its reasoning."""

from __future__ import annotations

from typing import Final

THINK, THINK_END = "<think>", "</think>"
_START: Final = THINK.encode()
_END: Final = THINK_END.encode()


class ThoughtTokens:
    """Counts the tokens of the `<think>` block that an answer begins with; those of its marks are not of it.

    The bytes of each token are looked at when it comes, since its text may wait for a stop string to be told apart.

    Args:
        opened: True if the prompt has opened the block already.
        free: True if the answer may begin with one.
    """

    def __init__(self, *, opened: bool, free: bool) -> None:
        self._state = "inside" if opened else "before" if free else "behind"
        self._seen = b""
        # Of the tokens in `_seen`, how many bytes each has.
        self._sizes: list[int] = []
        self.count = 0

    def push(self, data: bytes) -> None:
        """Take the bytes of the next token."""
        if self._state == "behind":
            return
        if self._state == "before":
            self._seen += data
            lead = self._seen.lstrip()
            if not lead.startswith(_START):
                self._state = "before" if _START.startswith(lead) else "behind"
                return
            self._state, self._seen, data = "inside", b"", lead[len(_START) :]
            if not data:
                return
        self.count += 1
        self._seen += data
        self._sizes.append(len(data))
        mark = self._seen.find(_END)
        if mark >= 0:
            self._state = "behind"
            end = len(self._seen)
            while self._sizes and end > mark and end - self._sizes[-1] >= mark:
                end -= self._sizes.pop()
                self.count -= 1
            return
        # What may be the beginning of the mark stays.
        while self._sizes and len(self._seen) - self._sizes[0] >= len(_END) - 1:
            self._seen = self._seen[self._sizes.pop(0) :]
