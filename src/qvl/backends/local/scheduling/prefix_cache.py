"""The prefix cache: the KV rows of sequences that ended, found by the hashes of their tokens and pictures. No torch.

A block's hash covers everything before it and the request's salt, so equal hashes mean equal prefixes of users who may
share them. Rows are kept as they are and counted (`Slot.holders`), so the least recently used prefix can be given away
at any time: memory comes back when nobody reads its rows any more.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Final, Protocol

from qvl.backends.local.scheduling.kv_cache import KvCache, Part, Slot
from qvl.backends.local.scheduling.states import KeptState

BLOCK: Final = 32
# Of the kept prefixes that end with the same block, so many are compared token by token.
COMPARED: Final = 4


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

    def pictures_from(self, token: int) -> Iterator[tuple[int, str]]:
        """Yield (where it begins, its key) of each picture that reaches beyond `token`."""
        return ((picture.start, picture.key) for picture in self.pictures if picture.end > token)


def common_blocks(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Return the number of blocks at the start of both, given their chains of hashes."""
    # Equal hashes mean that all blocks before are equal too.
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])


def common_tokens(
    one: BlockHashes, tokens: Sequence[int], other: BlockHashes, others: Sequence[int], limit: int, blocks: int
) -> int:
    """Return how many of the first `limit` tokens two sequences have in common that begin with the same `blocks`."""
    start = blocks * BLOCK
    if one.salt != other.salt:
        return 0
    end = min(limit, start + BLOCK, len(tokens), len(others))
    # Placeholders of different pictures are the same token.
    for pair in zip_longest(one.pictures_from(start), other.pictures_from(start)):
        if pair[0] != pair[1]:
            end = min(end, *(picture[0] for picture in pair if picture is not None))
            break
    return next((at for at in range(start, end) if tokens[at] != others[at]), max(start, end))


@dataclass(slots=True, eq=False)
class Prefix:
    """The KV of the first `num_tokens` of `tokens`, which lies in the rows of `parts` in this order.

    Where the model has states, only those behind the tokens of `states` are there, and nobody can begin elsewhere.
    """

    tokens: Sequence[int]
    num_tokens: int
    hashes: BlockHashes
    parts: tuple[Part, ...]
    states: tuple[KeptState, ...] = ()

    @property
    def blocks(self) -> Sequence[bytes]:
        return self.hashes.extend(self.tokens)[: self.num_tokens // BLOCK]


class PrefixIndex:
    """Keeps prefixes whose rows take at most `limit` tokens of KV memory; the least recently used goes first.

    Args:
        kv: accounting of the rows, each of which a prefix holds as often as it has it as a part.
        limit: tokens that the rows of kept prefixes may take; 0 keeps none.

    Attributes:
        num_tokens: what they take, rows that running sequences read too included.
        changes: how often a prefix came or went.
    """

    def __init__(self, kv: KvCache, limit: int) -> None:
        self.limit = limit
        self.num_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self.changes = 0
        self._kv = kv
        self._prefixes: OrderedDict[Prefix, None] = OrderedDict()
        self._by_block: dict[bytes, dict[Prefix, None]] = {}
        self._by_row: dict[Slot, Prefix] = {}
        self._held: dict[Slot, int] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, hashes: BlockHashes, tokens: Sequence[int], limit: int) -> tuple[Prefix | None, int]:
        """Return (the prefix that has the most of the first `limit` tokens, how many), touching none."""
        chain = hashes.extend(tokens)[: limit // BLOCK]
        # A prefix is found by all of its blocks, so where one is missing all behind it are.
        blocks = bisect_left(range(len(chain)), True, key=lambda at: chain[at] not in self._by_block)
        if not blocks:
            return None, 0
        found: Prefix | None = None
        known = 0
        for prefix in islice(reversed(self._by_block[chain[blocks - 1]]), COMPARED):
            most = min(limit, prefix.num_tokens)
            common = common_tokens(hashes, tokens, prefix.hashes, prefix.tokens, most, blocks)
            if common > known:
                found, known = prefix, common
        return found, known

    def find_state(
        self, hashes: BlockHashes, tokens: Sequence[int], limit: int
    ) -> tuple[Prefix | None, KeptState | None]:
        """Return the longest of the states that lie behind at most `limit` of these tokens, and its prefix."""
        chain = hashes.extend(tokens)[: limit // BLOCK]
        for blocks in range(
            bisect_left(range(len(chain)), True, key=lambda at: chain[at] not in self._by_block), 0, -1
        ):
            for prefix in islice(reversed(self._by_block[chain[blocks - 1]]), COMPARED):
                for mark in reversed(prefix.states):
                    if mark.tokens // BLOCK == blocks and mark.tokens <= limit:
                        most = min(limit, prefix.num_tokens)
                        common = common_tokens(hashes, tokens, prefix.hashes, prefix.tokens, most, blocks)
                        if common >= mark.tokens:
                            return prefix, mark
        return None, None

    def touch(self, prefix: Prefix) -> None:
        """Note that a prefix was used; those whose rows it reads are given away after it."""
        if prefix in self._prefixes:
            self._prefixes.move_to_end(prefix)
        for part in reversed(prefix.parts[:-1]):
            owner = self._by_row.get(part.slot)
            if owner is not None:
                self._prefixes.move_to_end(owner)

    def keep(self, prefix: Prefix) -> None:
        """Keep a prefix, whose rows it holds from now on; free them if it brings nothing that is not kept already."""
        blocks = prefix.blocks
        if not blocks or not self.limit or blocks[-1] in self._by_block:
            self._free(prefix)
            return
        self.changes += 1
        self._prefixes[prefix] = None
        for digest in blocks:
            self._by_block.setdefault(digest, {})[prefix] = None
        self._by_row[prefix.parts[-1].slot] = prefix
        for part in prefix.parts:
            count = self._held[part.slot] = self._held.get(part.slot, 0) + 1
            self.num_tokens += part.slot.capacity if count == 1 else 0
        self.num_tokens += len(prefix.states) * self._kv.state_tokens
        self.touch(prefix)
        while self.num_tokens > self.limit:
            self._evict()

    def take(self, prefix: Prefix) -> tuple[Part, ...]:
        """Forget a prefix and return its parts, whose rows, and its states, belong to the caller from now on."""
        self.changes += 1
        del self._prefixes[prefix]
        for digest in prefix.blocks:
            holders = self._by_block[digest]
            del holders[prefix]
            if not holders:
                del self._by_block[digest]
        del self._by_row[prefix.parts[-1].slot]
        for part in prefix.parts:
            self._held[part.slot] -= 1
            if not self._held[part.slot]:
                del self._held[part.slot]
                self.num_tokens -= part.slot.capacity
        self.num_tokens -= len(prefix.states) * self._kv.state_tokens
        return prefix.parts

    def make_room(self, capacity: int) -> bool:
        """Give prefixes away until a row of `capacity` or as many tokens are free; False if none became so."""
        before = self._kv.allocated_tokens
        while self._prefixes:
            free = self._kv.num_free(capacity)
            self._evict()
            if self._kv.num_free(capacity) > free or before - self._kv.allocated_tokens >= capacity:
                break
        return self._kv.allocated_tokens < before

    @property
    def idle_tokens(self) -> int:
        """The size of the rows and states that kept prefixes alone hold, in tokens."""
        rows = sum(slot.capacity for slot, count in tuple(self._held.items()) if slot.holders == count)
        marks = [mark for prefix in tuple(self._prefixes) for mark in prefix.states]
        return rows + self._kv.state_tokens * sum(self._kv.holders_of(mark.state) == 1 for mark in marks)

    @property
    def num_idle(self) -> int:
        """The number of rows that kept prefixes alone hold."""
        return sum(slot.holders == count for slot, count in tuple(self._held.items()))

    def clear(self) -> None:
        """Give all prefixes away."""
        while self._prefixes:
            self._evict()

    def _evict(self) -> None:
        self.evictions += 1
        oldest = next(iter(self._prefixes))
        self.take(oldest)
        self._free(oldest)

    def _free(self, prefix: Prefix) -> None:
        for part in prefix.parts:
            self._kv.free(part.slot)
        for mark in prefix.states:
            self._kv.free_state(mark.state)
