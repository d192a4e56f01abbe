"""The index of the prefix cache: blocks of KV, by hash of their tokens and pictures. No torch.

A block's hash covers everything before it and the request's salt, so equal hashes mean equal prefixes of users who may
share them. Blocks are copied on reuse, never shared, so the least recently used one can be evicted at any time.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

BLOCK: Final = 32


class PictureSpan(Protocol):
    """The placeholder tokens of a picture in a prompt; see processor.PreparedPicture."""

    @property
    def key(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass(slots=True)
class BlockHashes:
    """The chained hashes of one sequence's full blocks, extended as the sequence grows."""

    pictures: Sequence[PictureSpan]
    salt: str = ""
    hashes: list[bytes] = field(default_factory=list)

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the hashes of all full blocks of `tokens`, which must begin with the tokens of earlier calls."""
        for index in range(len(self.hashes), len(tokens) // BLOCK):
            start, end = index * BLOCK, (index + 1) * BLOCK
            digest = hashlib.sha256(self.hashes[-1] if self.hashes else self.salt.encode())
            digest.update(array("q", tokens[start:end]).tobytes())
            for picture in self.pictures:
                if picture.start < end and picture.end > start:
                    digest.update(f"{picture.key}@{start - picture.start};".encode())
            self.hashes.append(digest.digest())
        return self.hashes


def common_blocks(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Return the number of blocks at the start of both, given their chains of hashes."""
    # Equal hashes mean that all blocks before are equal too.
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])


class PrefixIndex:
    """Maps block hashes to blocks of the prefix cache, at most `max_blocks`, with LRU eviction.

    Args:
        max_blocks: capacity; 0 disables the cache.
        step: blocks by which the storage grows.
    """

    def __init__(self, max_blocks: int, step: int = 64) -> None:
        self.max_blocks = max_blocks
        self.reserved = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._step = step
        self._blocks: OrderedDict[bytes, int] = OrderedDict()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def count(self, hashes: Sequence[bytes], limit: int) -> int:
        """Return the number of blocks that `match` would return, touching none."""
        chain = hashes[: limit // BLOCK]
        return next((index for index, digest in enumerate(chain) if digest not in self._blocks), len(chain))

    def match(self, hashes: Sequence[bytes], limit: int) -> tuple[int, ...]:
        """Return the indices of the blocks that hold the longest cached prefix of at most `limit` tokens."""
        chain = hashes[: self.count(hashes, limit)]
        # Touched from the end, so that of one chain the last block is given away first and no block is unreachable.
        for digest in reversed(chain):
            self._blocks.move_to_end(digest)
        return tuple(self._blocks[digest] for digest in chain)

    def insert(self, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        """Allocate cache blocks for those of `hashes` that are missing; none are allocated if the cache is disabled.

        Returns:
            (index in the sequence, index in the cache) of each new block; fill them before the next `match`.
        """
        if not self.max_blocks:
            return []
        chain = hashes[: self.max_blocks]
        for digest in reversed(chain):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)
        missing = [(index, digest) for index, digest in enumerate(chain) if digest not in self._blocks]
        filled = []
        for index, digest in missing:
            block = self._take()
            filled.append((index, block))
            self._blocks[digest] = block
        for digest in reversed(chain):
            self._blocks.move_to_end(digest)
        return filled

    def clear(self) -> None:
        """Remove all blocks; their storage may be freed."""
        self._blocks.clear()
        self._free.clear()
        self.reserved = 0

    def _take(self) -> int:
        if not self._free:
            if self.reserved < self.max_blocks:
                more = min(self._step, self.max_blocks - self.reserved)
                self._free.extend(range(self.reserved + more - 1, self.reserved - 1, -1))
                self.reserved += more
            else:
                self.evictions += 1
                return self._blocks.popitem(last=False)[1]
        return self._free.pop()
