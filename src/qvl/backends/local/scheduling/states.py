"""The states of a sequence, where the model has any: what a step reads and writes, and what is kept. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from qvl.backends.local.scheduling.kv_cache import KvCache


class KeptState(NamedTuple):
    """A state to keep: that behind the first `tokens` tokens of a text."""

    tokens: int
    state: int


@dataclass(slots=True)
class SequenceStates:
    """A sequence's states, each a number of `KvCache`.

    Args:
        now: behind the tokens computed so far; None at the start of the text. Another's is read and never written.
        next: where the state behind the next tokens goes.
        spare: where the one behind that goes, if it is not where `now` is.
        marks: those to keep for who begins with the same tokens, in the order of the text.
    """

    now: int | None
    next: int
    spare: int | None
    marks: list[KeptState] = field(default_factory=list)

    @classmethod
    def take(cls, kv: KvCache, start: KeptState | None, places: Iterable[int]) -> SequenceStates | None:
        """Return states for a sequence that begins behind `start`, of which it takes over a hold; None without room.

        `places` are where marks are wanted; they are left out where there is no room for them. `start` is one too.
        """
        first = kv.take_state()
        second = None if first is None else kv.take_state()
        if first is None or second is None:
            if first is not None:
                kv.free_state(first)
            return None
        states = cls(None if start is None else start.state, first, second)
        if start is not None:
            kv.hold_state(start.state)
            states.marks.append(start)
        for place in sorted(set(places)):
            state = kv.take_state()
            if state is None:
                break
            states.marks.append(KeptState(place, state))
        return states

    def advance(self, kv: KvCache) -> None:
        """Note that a step wrote `next`."""
        before, self.now = self.now, self.next
        if self.spare is None:
            assert before is not None
            self.next = before
            return
        self.next, self.spare = self.spare, None
        if before is not None:
            kv.free_state(before)

    def known(self, computed: int) -> list[KeptState]:
        """Return the marks that are written, given how many tokens are computed."""
        return [mark for mark in self.marks if mark.tokens <= computed]

    def keep(self, kv: KvCache, computed: int) -> tuple[KeptState, ...]:
        """Return what to keep of a sequence that ended, the last state included; the rest is freed."""
        kept = self.known(computed)
        if self.now is not None and self.spare is None and all(mark.tokens < computed for mark in kept):
            kept.append(KeptState(computed, self.now))
            self.now = None
        self.marks = [mark for mark in self.marks if mark not in kept]
        self.free(kv)
        return tuple(kept)

    def free(self, kv: KvCache) -> None:
        """Free all of them."""
        for state in (self.now, self.next, self.spare, *(mark.state for mark in self.marks)):
            if state is not None:
                kv.free_state(state)
