"""Accounting of KV memory: allocates rows to sequences within a budget and lists the copies to do. No torch.

Rows live in pools of one capacity each (256, 512, 1024 ... tokens), so that a decode step reads plain strided views,
a long prompt takes no memory from short ones, and at most half of a row is unused. A sequence that outgrows its row
moves to the next pool. A row is freed when its last holder frees it: several sequences and kept prefixes may read it,
one writes. Pools grow and shrink in steps; the runner carries out the `Op`s in their order.

Some models keep a state beside, of a size that does not depend on the length of the text. States are numbered; what one
holds is never changed, a step reads one and writes another, so that a step can be computed twice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

SMALLEST: Final = 256


@dataclass(slots=True, eq=False)
class Slot:
    """An allocated KV row. `row` changes when the pool is compacted.

    Args:
        pool: tokens that a row of its pool can hold; negative for the pools of rows that are kept and never read by a
            step (see `KvCache.set_aside`).
        row: index in the pool.
        holders: how many hold it.
    """

    pool: int
    row: int
    holders: int = 1

    @property
    def capacity(self) -> int:
        return abs(self.pool)


class Part(NamedTuple):
    """The first `tokens` positions of a row, as a part of a sequence's KV."""

    slot: Slot
    tokens: int


@dataclass(frozen=True, slots=True)
class Resize:
    """Operation: resize a pool to `rows` rows; the remaining rows keep their content."""

    pool: int
    rows: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Operation: copy the first `tokens` positions of the (pool, row) `source` to those of `target` from `start` on."""

    source: tuple[int, int]
    target: tuple[int, int]
    tokens: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class ResizeStates:
    """Operation: make room for `count` states; those that remain keep their content."""

    count: int


Op: TypeAlias = Resize | Copy | ResizeStates
# A sequence reads one and writes another, and keeps one for those who begin with the same prompt.
STATES_EACH: Final = 3


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
        state_tokens: tokens of KV that take as much memory as a state; 0 for a model without states.
    """

    def __init__(self, budget: int, max_tokens: int, smallest: int = SMALLEST, state_tokens: int = 0) -> None:
        self.capacities = capacities(max_tokens, smallest)
        self.state_tokens = state_tokens
        self.budget = self._at_least(budget)
        self.ops: deque[Op] = deque()
        self._slots: dict[int, dict[int, Slot]] = {}
        self.rows: dict[int, int] = {}
        self.num_states = 0
        self._states: dict[int, int] = {}
        self._forget()

    @property
    def reserved(self) -> int:
        """Return the size of all pools in tokens, free rows included."""
        return sum(abs(pool) * rows for pool, rows in self.rows.items()) + self.num_states * self.state_tokens

    @property
    def num_slots(self) -> int:
        """Return the number of allocated rows."""
        return sum(len(slots) for slots in self._slots.values())

    @property
    def allocated_tokens(self) -> int:
        """Return the size of the allocated rows and states in tokens."""
        return (
            sum(abs(pool) * len(slots) for pool, slots in self._slots.items()) + len(self._states) * self.state_tokens
        )

    def num_free(self, capacity: int) -> int:
        """Return the number of free rows in the pool of `capacity` tokens a row; 0 if there is no such pool."""
        return self.rows.get(capacity, 0) - len(self._slots.get(capacity, ()))

    def take_ops(self) -> list[Op]:
        """Return and clear the operations that the runner must execute, in order, before the next forward pass."""
        ops = list(self.ops)
        self.ops.clear()
        return ops

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity of the smallest row for `tokens` tokens."""
        capacity = next((size for size in self.capacities if size >= tokens), None)
        if capacity is None:
            raise ValueError(f"{tokens} tokens do not fit into the longest KV row, of {self.capacities[-1]} tokens")
        return capacity

    def allocate(self, tokens: int) -> Slot | None:
        """Return the lowest free row for `tokens` tokens, or None if the budget is used up."""
        return self._allocate(self.capacity_for(tokens))

    def grow(self, slot: Slot, tokens: int, used: int) -> Slot | None:
        """Move a sequence of `used` tokens to a row for `tokens`, and free `slot`; None if the budget is used up.

        Returns `slot` itself if it is large enough; otherwise only the returned slot is the caller's.
        """
        if tokens <= slot.capacity:
            return slot
        larger = self.allocate(tokens)
        if larger is not None:
            self.copy(slot, larger, used)
            self.free(slot)
        return larger

    def set_aside(self, slot: Slot, used: int) -> Slot | None:
        """Move what is kept to a row that no step reads, and free `slot`; None, and nothing done, without room."""
        aside = self._allocate(-self.capacity_for(used))
        if aside is not None:
            self.copy(slot, aside, used)
            self.free(slot)
        return aside

    def copy(self, source: Slot, target: Slot, tokens: int, start: int = 0) -> None:
        """Add the operation that copies the first `tokens` positions of `source` to those from `start` on."""
        if tokens:
            self.ops.append(Copy((source.pool, source.row), (target.pool, target.row), tokens, start))

    def hold(self, slot: Slot) -> None:
        """Hold an allocated row once more."""
        slot.holders += 1

    def free(self, slot: Slot) -> None:
        """Free a row if nobody else holds it. The pool keeps its memory for the next sequence or another pool."""
        if self._slots[slot.pool].get(slot.row) is not slot:
            raise ValueError(f"KV row {slot.row} (pool of {slot.capacity} tokens) is free already, or not this slot's")
        slot.holders -= 1
        if not slot.holders:
            del self._slots[slot.pool][slot.row]

    def take_state(self) -> int | None:
        """Return a free state, or None if the budget is used up."""
        if len(self._states) == self.num_states:
            room = self._room_for(self.state_tokens)
            if room < 1:
                return None
            self._resize_states(self.num_states + min(max(1, self.num_states // 2), room))
        state = next(state for state in range(self.num_states) if state not in self._states)
        self._states[state] = 1
        return state

    def hold_state(self, state: int) -> None:
        """Hold a state once more."""
        self._states[state] += 1

    def holders_of(self, state: int) -> int:
        """Return how many hold a state."""
        return self._states.get(state, 0)

    def free_state(self, state: int) -> None:
        """Free a state if nobody else holds it."""
        self._states[state] -= 1
        if not self._states[state]:
            del self._states[state]

    def reset(self, budget: int) -> None:
        """Drop all rows, none of which may be allocated, and set another budget in tokens."""
        held = self.num_slots + len(self._states)
        if held:
            raise ValueError(f"cannot reset the KV cache while {held} rows and states are allocated: free them first")
        self.budget = self._at_least(budget)
        self.ops.clear()
        self._forget()

    def release_unused(self) -> int:
        """Shrink every pool to its allocated rows; return the number of tokens of KV memory freed."""
        before = self.reserved
        for pool in self.rows:
            self._shrink(pool)
        last = max(self._states, default=-1) + 1
        if last < self.num_states:
            self._resize_states(last)
        return before - self.reserved

    def _forget(self) -> None:
        pools = (*self.capacities, *(-capacity for capacity in self.capacities))
        self.rows = dict.fromkeys(pools, 0)
        self._slots = {pool: {} for pool in pools}
        self.num_states = 0

    def _at_least(self, budget: int) -> int:
        return max(budget, self.capacities[-1] + STATES_EACH * self.state_tokens)

    def _room_for(self, size: int) -> int:
        """Return how many things of `size` tokens fit into the budget; what is free is given back where none does."""
        room = (self.budget - self.reserved) // size
        if room < 1:
            self.release_unused()
            room = (self.budget - self.reserved) // size
        return room

    def _resize_states(self, count: int) -> None:
        self.num_states = count
        self.ops.append(ResizeStates(count))

    def _allocate(self, pool: int) -> Slot | None:
        slots = self._slots[pool]
        row = next((row for row in range(self.rows[pool]) if row not in slots), None)
        if row is None:
            if not self._grow(pool):
                return None
            row = next(row for row in range(self.rows[pool]) if row not in slots)
        slot = slots[row] = Slot(pool, row)
        return slot

    def _grow(self, pool: int) -> bool:
        """Grow a pool by half, within the budget; return False if not even one row fits."""
        room = self._room_for(abs(pool))
        if room < 1:
            return False
        rows = self.rows[pool]
        self._resize(pool, rows + min(max(1, rows // 2), room))
        return True

    def _shrink(self, pool: int) -> None:
        slots = self._slots[pool]
        if len(slots) == self.rows[pool]:
            return
        holes = iter([row for row in range(len(slots)) if row not in slots])
        for row in sorted(row for row in slots if row >= len(slots)):
            slot = slots.pop(row)
            slot.row = next(holes)
            slots[slot.row] = slot
            self.ops.append(Copy((pool, row), (pool, slot.row), abs(pool)))
        self._resize(pool, len(slots))

    def _resize(self, pool: int, rows: int) -> None:
        self.rows[pool] = rows
        self.ops.append(Resize(pool, rows))
