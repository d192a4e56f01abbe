"""The tensors of keys and values, which `kv_cache` accounts for: KV rows by pool, and prefix cache blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qvl.backends.local.scheduling.kv_cache import Copy, LoadBlocks, Op, Resize
from qvl.backends.local.scheduling.prefix_cache import BLOCK

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Layout:
    """The shape of the keys and values of one token; `devices` are those of the layers, in order."""

    devices: Sequence[torch.device]
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * len(self.devices) * self.num_heads * self.head_dim * self.dtype.itemsize


@dataclass(slots=True)
class Storage:
    """The keys and values of all sequences and of the prefix cache.

    `pools[capacity]` is a list, per layer, of (keys, values), each [rows, kv heads, capacity, head_dim]. Heads come
    before positions so that a decode step reads each head's keys in one run of memory.
    """

    layout: Layout
    pools: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    blocks: list[torch.Tensor] = field(default_factory=list)

    def apply(self, ops: Sequence[Op]) -> None:
        """Execute the resizes and copies of `KvCache.take_ops()`, in order."""
        for op in ops:
            if isinstance(op, Resize):
                self._resize(op)
            elif isinstance(op, Copy):
                self._copy(op)
            else:
                self._load(op)

    def num_rows(self, capacity: int) -> int:
        """Return the number of KV rows in the pool of `capacity` tokens a row."""
        return self.pools[capacity][0][0].shape[0]

    def save(self, capacity: int, row: int, pairs: Sequence[tuple[int, int]], num_blocks: int) -> None:
        """Copy blocks of a KV row to the prefix cache, grown to `num_blocks`; `pairs`: (index in row, in cache)."""
        import torch

        self._reserve(num_blocks)
        indices = [index for index, _ in pairs]
        first, last = indices[0], indices[-1] + 1
        for layer, (keys, values) in enumerate(self.pools[capacity]):
            blocks = self.blocks[layer]
            where = torch.tensor([block for _, block in pairs], device=keys.device)
            for side, tensor in enumerate((keys, values)):
                # [heads, tokens, dim] -> [blocks, heads, BLOCK, dim]
                cut = (
                    tensor[row, :, first * BLOCK : last * BLOCK]
                    .view(-1, last - first, BLOCK, tensor.shape[3])
                    .transpose(0, 1)
                )
                if len(indices) != last - first:
                    cut = cut[[index - first for index in indices]]
                blocks[side].index_copy_(0, where, cut)

    def clear(self) -> None:
        """Free all rows and prefix blocks, after an out-of-memory error (with `KvCache.reset`)."""
        self.pools.clear()
        self.blocks.clear()

    def clear_blocks(self) -> None:
        self.blocks.clear()

    @property
    def num_bytes(self) -> int:
        pairs = (tensor for pool in self.pools.values() for pair in pool for tensor in pair)
        return sum(tensor.nbytes for tensor in pairs) + sum(tensor.nbytes for tensor in self.blocks)

    def _resize(self, op: Resize) -> None:
        import torch

        if not op.rows:
            self.pools.pop(op.capacity, None)
            return
        shape = (op.rows, self.layout.num_heads, op.capacity, self.layout.head_dim)
        layers = self.pools.setdefault(op.capacity, [])
        for index, device in enumerate(self.layout.devices):
            # Zeros, not garbage: masked positions are multiplied by 0, and 0 * NaN is NaN.
            pair = tuple(torch.zeros(shape, dtype=self.layout.dtype, device=device) for _ in range(2))
            if index < len(layers):
                kept = min(op.rows, layers[index][0].shape[0])
                for new, old in zip(pair, layers[index], strict=True):
                    new[:kept] = old[:kept]
                layers[index] = (pair[0], pair[1])
            else:
                layers.append((pair[0], pair[1]))

    def _copy(self, op: Copy) -> None:
        (source_pool, source_row), (target_pool, target_row) = op.source, op.target
        for source, target in zip(self.pools[source_pool], self.pools[target_pool], strict=True):
            for old, new in zip(source, target, strict=True):
                new[target_row, :, : op.tokens] = old[source_row, :, : op.tokens]

    def _load(self, op: LoadBlocks) -> None:
        import torch

        capacity, row = op.target
        tokens = len(op.blocks) * BLOCK
        for (keys, values), blocks in zip(self.pools[capacity], self.blocks, strict=True):
            where = torch.tensor(op.blocks, device=keys.device)
            for side, tensor in enumerate((keys, values)):
                loaded = blocks[side].index_select(0, where).transpose(0, 1)
                tensor[row, :, :tokens] = loaded.reshape(loaded.shape[0], tokens, loaded.shape[3])

    def _reserve(self, num_blocks: int) -> None:
        import torch

        for index, device in enumerate(self.layout.devices):
            have = self.blocks[index].shape[1] if index < len(self.blocks) else 0
            if have >= num_blocks:
                continue
            shape = (2, num_blocks, self.layout.num_heads, BLOCK, self.layout.head_dim)
            new = torch.empty(shape, dtype=self.layout.dtype, device=device)
            if have:
                new[:, :have] = self.blocks[index]
                self.blocks[index] = new
            else:
                self.blocks.append(new)
