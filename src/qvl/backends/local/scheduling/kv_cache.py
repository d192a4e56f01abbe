"""Accounting of KV memory: allocates rows to sequences within a budget and lists the copies to do. No torch.

Rows live in pools of one capacity each (256, 512, 1024 ... tokens), so that a decode step reads plain strided views,
a long prompt takes no memory from short ones, and at most half of a row is unused. A sequence that outgrows its row
moves to the next pool. Pools grow and shrink in steps; the runner carries out the `Op`s in their order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, TypeAlias

SMALLEST: Final = 256


@dataclass(slots=True, eq=False)
class Slot:
    """An allocated KV row in the pool of `capacity` tokens a row. `row` changes when the pool is compacted."""

    capacity: int
    row: int


@dataclass(frozen=True, slots=True)
class Resize:
    """Operation: resize the pool of `capacity` to `rows` rows; the remaining rows keep their content."""

    capacity: int
    rows: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Operation: copy the first `tokens` positions of the (capacity, row) `source` to `target`."""

    source: tuple[int, int]
    target: tuple[int, int]
    tokens: int


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Operation: copy prefix cache blocks, in order, to the start of the (capacity, row) `target`."""

    blocks: tuple[int, ...]
    target: tuple[int, int]


Op: TypeAlias = Resize | Copy | LoadBlocks


def capacities(max_tokens: int, smallest: int = SMALLEST) -> tuple[int, ...]:
    """Return the row length of each pool, in tokens: `smallest`, doubled up to `max_tokens` (rounded up)."""
    top = -(-max_tokens // smallest) * smallest
    sizes = []
    size = smallest
    while size < top:
        sizes.append(size)
        size *= 2
    return (*sizes, top)


class KvCache:
    """Allocates KV rows within `budget` tokens.

    Args:
        budget: tokens that all rows, free ones included, may take; at least one longest row.
        max_tokens: the longest sequence.
        smallest: capacity of the smallest pool.
    """

    def __init__(self, budget: int, max_tokens: int, smallest: int = SMALLEST) -> None:
        self.capacities = capacities(max_tokens, smallest)
        self.budget = max(budget, self.capacities[-1])
        self.rows: dict[int, int] = dict.fromkeys(self.capacities, 0)
        self.ops: deque[Op] = deque()
        self._slots: dict[int, dict[int, Slot]] = {capacity: {} for capacity in self.capacities}

    @property
    def reserved(self) -> int:
        """Return the size of all pools in tokens, free rows included."""
        return sum(capacity * rows for capacity, rows in self.rows.items())

    @property
    def num_slots(self) -> int:
        """Return the number of allocated rows."""
        return sum(len(slots) for slots in self._slots.values())

    @property
    def allocated_tokens(self) -> int:
        """Return the size of the allocated rows in tokens."""
        return sum(capacity * len(slots) for capacity, slots in self._slots.items())

    def take_ops(self) -> list[Op]:
        """Return and clear the operations that the runner must execute, in order, before the next forward pass."""
        ops = list(self.ops)
        self.ops.clear()
        return ops

    def allocate(self, tokens: int) -> Slot | None:
        """Return the lowest free row for `tokens` tokens, or None if the budget is used up."""
        capacity = next((size for size in self.capacities if size >= tokens), None)
        if capacity is None:
            raise ValueError(f"{tokens} tokens do not fit into the longest KV row, of {self.capacities[-1]} tokens")
        slots = self._slots[capacity]
        row = next((row for row in range(self.rows[capacity]) if row not in slots), None)
        if row is None:
            if not self._grow(capacity):
                return None
            row = next(row for row in range(self.rows[capacity]) if row not in slots)
        slot = slots[row] = Slot(capacity, row)
        return slot

    def grow(self, slot: Slot, tokens: int, used: int) -> Slot | None:
        """Move a sequence of `used` tokens to a row for `tokens`, and free `slot`; None if the budget is used up.

        Returns `slot` itself if it is large enough; otherwise only the returned slot is valid.
        """
        if tokens <= slot.capacity:
            return slot
        larger = self.allocate(tokens)
        if larger is not None:
            self.copy(slot, larger, used)
            self.free(slot)
        return larger

    def copy(self, source: Slot, target: Slot, tokens: int) -> None:
        """Add an operation that copies the first `tokens` positions of `source` to `target`."""
        if tokens:
            self.ops.append(Copy((source.capacity, source.row), (target.capacity, target.row), tokens))

    def load(self, blocks: tuple[int, ...], target: Slot) -> None:
        """Add an operation that copies prefix cache `blocks` to the start of `target`."""
        self.ops.append(LoadBlocks(blocks, (target.capacity, target.row)))

    def free(self, slot: Slot) -> None:
        """Free a row. The pool keeps its memory for the next sequence, until another pool needs it."""
        if self._slots[slot.capacity].pop(slot.row, None) is not slot:
            raise ValueError(f"KV row {slot.row} (pool of {slot.capacity} tokens) is free already, or not this slot's")

    def reset(self, budget: int) -> None:
        """Drop all rows, none of which may be allocated, and set another budget in tokens."""
        if self.num_slots:
            raise ValueError(f"cannot reset the KV cache while {self.num_slots} rows are allocated: free them first")
        self.budget = max(budget, self.capacities[-1])
        self.rows = dict.fromkeys(self.capacities, 0)
        self.ops.clear()

    def release_unused(self) -> int:
        """Shrink every pool to its allocated rows; return the number of tokens of KV memory freed."""
        before = self.reserved
        for capacity in self.capacities:
            self._shrink(capacity)
        return before - self.reserved

    def _grow(self, capacity: int) -> bool:
        """Grow a pool by half, within the budget; return False if not even one row fits."""
        rows = self.rows[capacity]
        room = (self.budget - self.reserved) // capacity
        if room < 1:
            self.release_unused()
            room = (self.budget - self.reserved) // capacity
            if room < 1:
                return False
        self._resize(capacity, self.rows[capacity] + min(max(1, rows // 2), room))
        return True

    def _shrink(self, capacity: int) -> None:
        slots = self._slots[capacity]
        if len(slots) == self.rows[capacity]:
            return
        holes = iter([row for row in range(len(slots)) if row not in slots])
        for row in sorted(row for row in slots if row >= len(slots)):
            slot = slots.pop(row)
            slot.row = next(holes)
            slots[slot.row] = slot
            self.ops.append(Copy((capacity, row), (capacity, slot.row), capacity))
        self._resize(capacity, len(slots))

    def _resize(self, capacity: int, rows: int) -> None:
        self.rows[capacity] = rows
        self.ops.append(Resize(capacity, rows))
