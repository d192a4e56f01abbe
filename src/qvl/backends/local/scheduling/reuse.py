"""Decides what a waiting sequence takes from others' KV: rows to read where they lie, and parts to copy. No torch.

A long prefix is shared: the sequence reads it in the other's row, which is held once for all. A short one is copied to
the start of its own row, since each part of a sequence's KV is one attention more in every step of its answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from qvl.backends.local.scheduling.kv_cache import KvCache, Part
from qvl.backends.local.scheduling.prefix_cache import BLOCK, Prefix, PrefixIndex, common_blocks, common_tokens
from qvl.backends.local.scheduling.sequence import Sequence

# Tokens from which a part is shared; fewer only where fewer steps than tokens would read it.
WORTH_SHARING: Final = 8 * BLOCK
# Rows of others that a sequence reads.
MOST_PARTS: Final = 3
# A kept row that nobody reads is taken over if this part of what is taken is all that is lost with it.
LOST: Final = 1 / 4
# A row is kept if this part of it is used: an almost empty one would take the memory of fuller ones.
WORTH_KEEPING: Final = 1 / 4


@dataclass(frozen=True, slots=True)
class Reuse:
    """The KV of the first `known` tokens of a waiting sequence, in this order.

    Args:
        shared: parts of others' rows, read where they lie.
        copied: parts to copy to the start of its own row.
        source: the kept prefix that they come from, if it is one.
        taken: the row of `source` becomes the sequence's own, with what it holds behind `shared`.
        ready: how many of them have their KV before the step that is being scheduled.
        counted: it counts as cached; the prompt of another choice of the same request does not.
        state: the state behind the known tokens, where the model has states.
        common: how many tokens others begin with too; with states that may be more than can be taken from them.
    """

    known: int = 0
    shared: tuple[Part, ...] = ()
    copied: tuple[Part, ...] = ()
    source: Prefix | None = None
    taken: bool = False
    ready: int = 0
    counted: bool = False
    state: int | None = None
    common: int = 0


class PrefixSharing:
    """Looks for prefixes among running sequences and kept rows.

    Args:
        shares: rows can be read by several sequences; else every prefix is copied.
    """

    def __init__(self, kv: KvCache, prefixes: PrefixIndex, *, shares: bool = True) -> None:
        self.shares = shares
        self._kv = kv
        self._prefixes = prefixes

    def common(self, sequence: Sequence, other: Sequence, limit: int) -> int:
        """Return how many of the first `limit` tokens both begin with, of users who may share them."""
        if other.prepared is sequence.prepared:
            return min(sequence.num_prompt, limit)
        if not self._prefixes.limit or limit <= 0:
            return 0
        lengths = len(sequence.tokens), len(other.tokens)
        known = sequence.compared.get(other)
        if known is None or known[0] != lengths:
            blocks = common_blocks(sequence.hashes.extend(sequence.tokens), other.hashes.extend(other.tokens))
            common = common_tokens(sequence.hashes, sequence.tokens, other.hashes, other.tokens, min(lengths), blocks)
            known = sequence.compared[other] = lengths, common
        return min(known[1], limit)

    def best(self, sequence: Sequence, running: Iterable[Sequence], headroom: int) -> Reuse:
        """Return what saves `sequence` most, all tokens but one; it needs a row with `headroom` for more."""
        if sequence.scores is not None:
            return Reuse()
        limit = len(sequence.tokens) - 1
        if self._kv.state_tokens:
            return self._best_state(sequence, running, limit, headroom)
        best = self._kept(sequence, limit, headroom)
        for other in running:
            if other.slot is None or not _longer(sequence, other, best.known):
                continue
            # In the step that is being scheduled, others can read what one of them computes, but not copy it.
            there = other.num_scheduled if self.shares else other.num_ready
            common = self.common(sequence, other, min(there, limit))
            if common > best.known:
                own = Part(other.slot, there - other.base)
                found = self._split(sequence, (*other.shared, own), common, other.num_ready)
                if found.known > best.known:
                    best = replace(found, counted=other.prepared is not sequence.prepared)
        return best

    def _best_state(self, sequence: Sequence, running: Iterable[Sequence], limit: int, headroom: int) -> Reuse:
        """Return `best` for a model with states: up to the longest state that is behind tokens of `sequence`."""
        common = self._prefixes.find(sequence.hashes, sequence.tokens, limit)[1] if self._prefixes.limit else 0
        best = self._kept(sequence, limit, headroom)
        for other in running:
            if other.slot is None or other.states is None or not _longer(sequence, other, best.known):
                continue
            shared = self.common(sequence, other, limit)
            common = max(common, shared)
            there = min(shared, other.num_computed)
            mark = max((mark for mark in other.states.known(there)), default=None)
            if mark is not None and mark.tokens > best.known:
                own = Part(other.slot, other.num_computed - other.base)
                found = self._split(sequence, (*other.shared, own), mark.tokens, mark.tokens)
                best = replace(found, counted=other.prepared is not sequence.prepared, state=mark.state)
        return replace(best, common=common)

    def keep(self, sequence: Sequence) -> None:
        """Keep the KV of a sequence that ended, if it is worth it; then its rows are no longer the sequence's."""
        slot, own = sequence.slot, sequence.num_computed - sequence.base
        if slot is None or own < WORTH_KEEPING * slot.capacity:
            return
        if not self.shares:
            aside = self._kv.set_aside(slot, own) if self._prefixes.limit else None
            if aside is None:
                return
            slot = aside
        count, parts = sequence.num_computed, (*sequence.shared, Part(slot, own))
        states = () if sequence.states is None else sequence.states.keep(self._kv, count)
        self._prefixes.keep(Prefix(sequence.tokens, count, sequence.hashes, parts, states))
        sequence.slot, sequence.shared, sequence.states = None, (), None

    def _kept(self, sequence: Sequence, limit: int, headroom: int) -> Reuse:
        if not self._prefixes.limit:
            return Reuse()
        state: int | None = None
        if self._kv.state_tokens:
            prefix, mark = self._prefixes.find_state(sequence.hashes, sequence.tokens, limit)
            common, state = (0, None) if mark is None else mark
        else:
            prefix, common = self._found(sequence, limit)
        if prefix is None:
            return Reuse()
        *before, own = prefix.parts
        base = prefix.num_tokens - own.tokens
        lost = prefix.num_tokens - common
        fits = len(sequence.tokens) - base + headroom <= own.slot.capacity
        if self.shares and fits and own.slot.holders == 1 and common > base and lost <= LOST * common:
            return Reuse(common, tuple(before), source=prefix, taken=True, ready=common, counted=True, state=state)
        return replace(self._split(sequence, prefix.parts, common, common), source=prefix, counted=True, state=state)

    def _found(self, sequence: Sequence, limit: int) -> tuple[Prefix | None, int]:
        """Return what the index finds for a waiting sequence, which is looked for again once the index has changed."""
        changes = self._prefixes.changes
        if sequence.found is None or sequence.found[:2] != (changes, limit):
            sequence.found = changes, limit, *self._prefixes.find(sequence.hashes, sequence.tokens, limit)
        return sequence.found[2:]

    def _split(self, sequence: Sequence, parts: Iterable[Part], common: int, ready: int) -> Reuse:
        """Return the first `common` tokens of `parts`, of which those before `ready` can be copied."""
        shortest = min(WORTH_SHARING, max(1, sequence.remaining)) if self.shares else common + 1
        shared: list[Part] = []
        copied: list[Part] = []
        known = 0
        for part in parts:
            tokens = min(part.tokens, common - known)
            if tokens >= shortest and len(shared) < MOST_PARTS and not copied:
                shared.append(Part(part.slot, tokens))
            else:
                tokens = min(tokens, ready - known)
                if tokens <= 0:
                    break
                copied.append(Part(part.slot, tokens))
            known += tokens
            if tokens < part.tokens:
                break
        return Reuse(known, tuple(shared), tuple(copied), ready=min(known, ready))


def _longer(sequence: Sequence, other: Sequence, known: int) -> bool:
    """False if the two cannot have more than `known` tokens in common."""
    return known < min(len(sequence.tokens), len(other.tokens)) and sequence.tokens[known] == other.tokens[known]
