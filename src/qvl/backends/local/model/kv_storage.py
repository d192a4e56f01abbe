"""The tensors of keys and values, which `kv_cache` accounts for: KV rows by pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qvl.backends.local.scheduling.kv_cache import Op, Resize, ResizeStates

if TYPE_CHECKING:
    import torch

    from qvl.backends.local.model.gated_delta import StateShape


@dataclass(slots=True)
class Layout:
    """The shape of the keys and values of one token, and of what else a sequence keeps.

    Args:
        devices: of the layers with keys and values, in order.
        states: device and shape of the state of each other layer.
    """

    devices: Sequence[torch.device]
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    states: Sequence[tuple[torch.device, StateShape]] = ()

    @property
    def bytes_per_token(self) -> int:
        return 2 * len(self.devices) * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_state(self) -> int:
        return sum(shape.num_bytes for _, shape in self.states)


@dataclass(slots=True)
class Storage:
    """The keys and values of all sequences and kept prefixes.

    `pools[pool]` is a list, per layer, of (keys, values), each [rows, kv heads, capacity, head_dim]. Heads come before
    positions so that a decode step reads each head's keys in one run of memory.
    """

    layout: Layout
    pools: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    states: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def apply(self, ops: Sequence[Op]) -> None:
        """Execute the resizes and copies of `KvCache.take_ops()`, in order."""
        for op in ops:
            if isinstance(op, Resize):
                self._resize(op)
            elif isinstance(op, ResizeStates):
                self._resize_states(op.count)
            else:
                start, end = op.start, op.start + op.tokens
                (source_pool, source_row), (target_pool, target_row) = op.source, op.target
                for source, target in zip(self.pools[source_pool], self.pools[target_pool], strict=True):
                    for old, new in zip(source, target, strict=True):
                        new[target_row, :, start:end] = old[source_row, :, : op.tokens]

    def num_rows(self, pool: int) -> int:
        """Return the number of KV rows in a pool."""
        return self.pools[pool][0][0].shape[0]

    def clear(self) -> None:
        """Free all rows and states, after an out-of-memory error (with `KvCache.reset`)."""
        self.pools.clear()
        self.states.clear()

    @property
    def num_bytes(self) -> int:
        pairs = [*self.states, *(pair for pool in self.pools.values() for pair in pool)]
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def _resize(self, op: Resize) -> None:
        import torch

        if not op.rows:
            self.pools.pop(op.pool, None)
            return
        shape = (op.rows, self.layout.num_heads, abs(op.pool), self.layout.head_dim)
        layers = self.pools.setdefault(op.pool, [])
        for index, device in enumerate(self.layout.devices):
            keys, values = (torch.empty(shape, dtype=self.layout.dtype, device=device) for _ in range(2))
            kept = 0
            if index < len(layers):
                kept = min(op.rows, layers[index][0].shape[0])
                for new, old in zip((keys, values), layers[index], strict=True):
                    new[:kept] = old[:kept]
            # Zeros, not garbage: masked positions are multiplied by 0, and 0 * NaN is NaN.
            keys[kept:].zero_()
            values[kept:].zero_()
            layers[index : index + 1] = [(keys, values)]

    def _resize_states(self, count: int) -> None:
        """Make room for `count` states in each layer that has them; those that are there stay."""
        import torch

        for index, (device, shape) in enumerate(self.layout.states):
            sizes = (shape.taps, shape.channels), (shape.heads, shape.key_dim, shape.value_dim)
            new = (
                torch.zeros((count, *sizes[0]), dtype=shape.dtype, device=device),
                torch.zeros((count, *sizes[1]), dtype=torch.float32, device=device),
            )
            if index < len(self.states):
                for old, fresh in zip(self.states[index], new, strict=True):
                    kept = min(count, len(old))
                    fresh[:kept] = old[:kept]
                self.states[index] = new
            else:
                self.states.append(new)
