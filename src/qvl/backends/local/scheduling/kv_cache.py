"""Accounting of KV memory: who holds which row, what must be copied where, and that the budget is kept. No torch.

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
    """One row of the pool of `capacity` tokens. `row` changes when the pool is compacted."""

    capacity: int
    row: int


@dataclass(frozen=True, slots=True)
class Resize:
    """The pool of `capacity` must have exactly `rows` rows; those that stay keep their content."""

    capacity: int
    rows: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` positions of (capacity, row) `source` are wanted in `target`."""

    source: tuple[int, int]
    target: tuple[int, int]
    tokens: int


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Prefix blocks are wanted, one behind the other, at the start of `target`."""

    blocks: tuple[int, ...]
    target: tuple[int, int]


Op: TypeAlias = Resize | Copy | LoadBlocks


def capacities(max_tokens: int, smallest: int = SMALLEST) -> tuple[int, ...]:
    """Return doubling row lengths up to `max_tokens` rounded up to a multiple of `smallest`."""
    top = -(-max_tokens // smallest) * smallest
    sizes = []
    size = smallest
    while size < top:
        sizes.append(size)
        size *= 2
    return (*sizes, top)


class KvCache:
    """Hands out rows within `budget` tokens.

    Args:
        budget: tokens that all rows together may hold, unused ones counted; at least one longest row.
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
        """Return the tokens of memory that the pools take."""
        return sum(capacity * rows for capacity, rows in self.rows.items())

    @property
    def num_slots(self) -> int:
        """Return the number of rows that are held."""
        return sum(len(slots) for slots in self._slots.values())

    @property
    def held_tokens(self) -> int:
        """Return how many tokens of KV memory the rows in use take."""
        return sum(capacity * len(slots) for capacity, slots in self._slots.items())

    def take_ops(self) -> list[Op]:
        """Return what the runner must do, in order, before anything is written; forgotten here."""
        ops = list(self.ops)
        self.ops.clear()
        return ops

    def allocate(self, tokens: int) -> Slot | None:
        """Return the lowest free row that holds `tokens`, or None while there is no room."""
        capacity = next((size for size in self.capacities if size >= tokens), None)
        if capacity is None:
            raise ValueError(f"{tokens} tokens do not fit the longest row of {self.capacities[-1]}")
        slots = self._slots[capacity]
        row = next((row for row in range(self.rows[capacity]) if row not in slots), None)
        if row is None:
            if not self._grow(capacity):
                return None
            row = next(row for row in range(self.rows[capacity]) if row not in slots)
        slot = slots[row] = Slot(capacity, row)
        return slot

    def grow(self, slot: Slot, tokens: int, used: int) -> Slot | None:
        """Return a row for `tokens` with the first `used` positions of `slot`, which is freed; None without room.

        Only the returned slot is valid afterwards; it is `slot` itself when that is large enough.
        """
        if tokens <= slot.capacity:
            return slot
        larger = self.allocate(tokens)
        if larger is not None:
            self.copy(slot, larger, used)
            self.free(slot)
        return larger

    def copy(self, source: Slot, target: Slot, tokens: int) -> None:
        """Have the first `tokens` positions of `source` copied to `target`."""
        if tokens:
            self.ops.append(Copy((source.capacity, source.row), (target.capacity, target.row), tokens))

    def load(self, blocks: tuple[int, ...], target: Slot) -> None:
        """Have prefix `blocks` copied to the start of `target`."""
        self.ops.append(LoadBlocks(blocks, (target.capacity, target.row)))

    def free(self, slot: Slot) -> None:
        """Give a row back. Its memory is kept for the next one until another pool needs it."""
        if self._slots[slot.capacity].pop(slot.row, None) is not slot:
            raise ValueError(f"row {slot.row} of {slot.capacity} is not held by this slot")

    def reset(self, budget: int) -> None:
        """Forget all rows, none of which may be held, and go on with another budget."""
        if self.num_slots:
            raise ValueError(f"{self.num_slots} rows are still held")
        self.budget = max(budget, self.capacities[-1])
        self.rows = dict.fromkeys(self.capacities, 0)
        self.ops.clear()

    def release_unused(self) -> int:
        """Shrink every pool to its rows in use; return how many tokens of KV memory that frees."""
        before = self.reserved
        for capacity in self.capacities:
            self._shrink(capacity)
        return before - self.reserved

    def _grow(self, capacity: int) -> bool:
        """Add rows: half as many again where the budget has room, at least one."""
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
