"""Decides what the next step runs. No torch.

First come, first served: running answers are never stalled by a long prompt (prefill is budgeted in tokens), a prompt
waits until there is a row for it, and when rows cannot grow the youngest sequence gives its row back and starts over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from qvl.backends.local.scheduling.kv_cache import KvCache
from qvl.backends.local.scheduling.prefix_cache import BLOCK, PrefixIndex
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus

# Answers are often short: room for this many tokens beyond the prompt avoids most moves to a larger row.
HEADROOM: Final = 64


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Tokens start:start+count of a sequence are to be computed; the last chunk of a prompt gives a token."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """True if a token comes out of it."""
        return self.end == len(self.sequence.tokens)


@dataclass(slots=True)
class Step:
    """The work of one forward pass: one token of each of `decode`, and the chunks of `prefill`."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[ScheduledTokens] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.count for chunk in self.prefill)


class Scheduler:
    """Holds every sequence that is not finished.

    Args:
        kv: rows and their budget.
        prefixes: kept prefixes.
        max_num_seqs: how many may run at once.
        max_num_batched_tokens: tokens of one step, decode and prefill together.
    """

    def __init__(self, kv: KvCache, prefixes: PrefixIndex, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.kv = kv
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Have a new sequence wait behind all others."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence that ended or was aborted leave at once, and free its row. Harmless when already gone."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def preempt(self, sequence: Sequence) -> None:
        """Take the row away; the sequence waits in front and computes its tokens again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preempted += 1
        self.num_preemptions += 1
        # Two preempted ones must come back in their order of arrival.
        index = sum(1 for other in self.waiting if other.arrival < sequence.arrival)
        self.waiting.insert(index, sequence)

    def schedule(self) -> Step:
        """Return the next step; empty when nothing can run."""
        step = Step()
        self._decode(step)
        budget = self.max_num_batched_tokens - len(step.decode)
        for sequence in list(self.running):
            if budget > 0 and sequence.prefilling:
                budget -= self._chunk(step, sequence, budget)
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            if self._waits_for_leader(sequence):
                continue
            if not self._admit(sequence):
                break
            self.waiting.remove(sequence)
            budget -= self._chunk(step, sequence, budget)
        return step

    def _decode(self, step: Step) -> None:
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.prefilling:
                continue
            if len(step.decode) >= self.max_num_batched_tokens:
                break
            if self._room(sequence):
                step.decode.append(sequence)
        step.decode = [sequence for sequence in step.decode if sequence.status is SequenceStatus.RUNNING]

    def _room(self, sequence: Sequence) -> bool:
        """Make room for one more token, at the cost of the youngest if need be, which may be the sequence itself."""
        assert sequence.slot is not None
        while True:
            slot = self.kv.grow(sequence.slot, len(sequence.tokens), sequence.num_computed)
            if slot is not None:
                sequence.slot = slot
                return True
            youngest = max(self.running, key=lambda other: other.arrival)
            self.preempt(youngest)
            if youngest is sequence:
                return False

    def _chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.ready - sequence.num_computed, budget, sequence.max_chunk)
        if count <= 0:
            return 0
        step.prefill.append(ScheduledTokens(sequence, sequence.num_computed, count))
        return count

    @staticmethod
    def _waits_for_leader(sequence: Sequence) -> bool:
        leader = sequence.leader
        return (
            leader is not None
            and leader.status is not SequenceStatus.FINISHED
            and leader.num_computed < leader.num_prompt
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Give a row, filled with as much of the prompt as is known already; False while there is no room."""
        total = len(sequence.tokens) + max(1, min(sequence.remaining, HEADROOM))
        slot = self.kv.allocate(min(total, self.kv.capacities[-1]))
        if slot is None:
            return False
        sequence.slot = slot
        sequence.status = SequenceStatus.RUNNING
        sequence.num_computed = self._reuse(sequence, slot)
        index = sum(1 for other in self.running if other.arrival < sequence.arrival)
        self.running.insert(index, sequence)
        return True

    def _reuse(self, sequence: Sequence, slot: object) -> int:
        """Fill the row from the leader or from kept prefixes; the last token is always left to compute."""
        assert sequence.slot is not None
        limit = len(sequence.tokens) - 1
        leader = sequence.leader
        if leader is not None and leader.slot is not None and leader.num_computed >= sequence.num_prompt:
            known = min(limit, sequence.num_prompt)
            self.kv.copy(leader.slot, sequence.slot, known)
            return known
        if not self.prefixes.max_blocks:
            return 0
        blocks = self.prefixes.match(sequence.hashes.extend(sequence.tokens), limit)
        if blocks:
            self.kv.load(blocks, sequence.slot)
        known = len(blocks) * BLOCK
        self.prefixes.hit_tokens += known
        if sequence.num_preempted == 0:
            sequence.num_cached = min(known, sequence.num_prompt)
        return known

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.kv.free(sequence.slot)
            sequence.slot = None
        sequence.num_computed = 0
