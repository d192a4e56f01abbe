"""The scheduler of continuous batching: decides which tokens the next step computes. No torch.

A step has a time budget (see `StepBudget`): decoding sequences come first, then prompts, then slices of pictures. First
come, first served: a prompt waits until its pictures are encoded and a KV row is free, and if rows cannot grow the
youngest sequence is preempted and computed again later.

The unit of all this work is one token of a prompt; a picture counts as many as take its number of multiplications.
"""

from __future__ import annotations

from bisect import insort, insort_left
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Final

from qvl.backends.local.scheduling.kv_cache import KvCache, Slot
from qvl.backends.local.scheduling.prefix_cache import BLOCK, PrefixIndex, common_blocks
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.backends.local.scheduling.step_budget import StepBudget
from qvl.backends.local.scheduling.step_costs import StepCosts, Work

# Answers are often short: room for this many tokens beyond the prompt avoids most moves to a larger row.
HEADROOM: Final = 64
# Waiting prompts beyond the free places whose pictures are encoded already, so that the next place is not left empty.
AHEAD: Final = 2
# Tokens of a prefix under computation for which another prompt waits: for fewer it starts at once and computes its own.
WORTH_WAITING: Final = 4 * BLOCK
ORDER: Final = attrgetter("order")


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """A chunk: tokens start:start+count of a sequence; one that ends with the newest token samples the next.

    `draft` are guesses of what follows the newest token: computed with it, and kept as far as the sampler agrees.
    """

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def of_prompt(self) -> bool:
        """True if the chunk is, or begins with, a part of a prompt."""
        return self.start < self.sequence.num_prompt

    @property
    def samples(self) -> bool:
        """True if this chunk ends the prompt, so that a token is sampled after it."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledPictures:
    """About `units` of work on the pictures that a waiting sequence needs before its prompt can be computed."""

    sequence: Sequence
    units: float


@dataclass(slots=True)
class Step:
    """Slices of pictures, and one forward pass: one token of each of `decode`, and the chunks of `prefill`.

    Chunks belong to prompts, and to answers of which several tokens have no KV yet.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[ScheduledTokens] = field(default_factory=list)
    pictures: list[ScheduledPictures] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.pictures)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.count + len(chunk.draft) for chunk in self.prefill)

    @property
    def num_rows(self) -> int:
        """Return how many of the tokens belong to running answers."""
        runs = (chunk for chunk in self.prefill if not chunk.of_prompt)
        return len(self.decode) + sum(chunk.count + len(chunk.draft) for chunk in runs)

    @property
    def has_prompt(self) -> bool:
        return any(chunk.of_prompt for chunk in self.prefill)


@dataclass(slots=True)
class _Remaining:
    """The part of a step's budget that is not spent yet.

    Args:
        tokens: prompt tokens that the memory allows.
        units: prompt and picture work together that the time allows.
        picture_price: measured cost of a unit of picture work, in units of prompt work.
        reserved: units kept for pictures, where prompts that arrived later are concerned.
        since: place in the order of the first sequence that waits for pictures.
    """

    tokens: int
    units: float
    picture_price: float
    reserved: float
    since: tuple[float, float]

    def for_prompt(self, sequence: Sequence, step: Step, grain: int) -> float:
        """Return the units that a prompt may take: at least `grain`, or 0; the earliest one always gets `grain`."""
        earliest = sequence.order < self.since
        units = self.units if earliest else self.units - self.reserved
        if units < grain:
            units = grain if earliest and not step.has_prompt else 0.0
        return min(units, self.tokens)


class Scheduler:
    """Schedules all unfinished sequences: the waiting queue and the running ones.

    Args:
        kv: accounting of the KV rows.
        prefixes: index of the prefix cache.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: tokens of one step, decode and prefill together; bounds slices of pictures too.
        budget: time budget of the steps.
        key_cost: cost of attention to one earlier token, in units.
        draft_rows: steps that decode fewer tokens than these are filled up with guesses; 0 guesses nothing.
    """

    def __init__(
        self,
        kv: KvCache,
        prefixes: PrefixIndex,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        budget: StepBudget | None = None,
        key_cost: float = 0.0,
        draft_rows: int = 0,
    ) -> None:
        self.kv = kv
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.budget = budget or StepBudget(StepCosts())
        # Smaller pieces of a prompt or a picture cost more than they are worth.
        self.grain = max(1, max_num_batched_tokens // 32)
        # Prompts must go on beside them.
        self.draft_rows = min(draft_rows, max_num_batched_tokens // 4)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._key_cost = key_cost

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the waiting queue, behind those of its priority."""
        insort(self.waiting, sequence, key=ORDER)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence that ended or was aborted, and free its KV row. Does nothing if it is already removed."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def preempt(self, sequence: Sequence) -> None:
        """Free the KV row of a running sequence and put it at the front of the waiting queue, to be computed again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preempted += 1
        self.num_preemptions += 1
        # Two preempted ones must come back in their order of arrival.
        insort_left(self.waiting, sequence, key=ORDER)

    def schedule(self) -> Step:
        """Return the next step; an empty one if nothing can run."""
        step = Step()
        self._decode(step)
        candidates = self._candidates()
        remaining = self._remaining(step, candidates)
        for sequence in list(self.running):
            if sequence.prefilling:
                self._chunk(step, sequence, remaining)
        for sequence, pictures in candidates:
            if len(self.running) >= self.max_num_seqs or not remaining.for_prompt(sequence, step, self.grain):
                break
            # One that was admitted just now may compute what this one begins with.
            if pictures or self._waits_for_prefix(sequence):
                continue
            if not self._admit(sequence):
                break
            self.waiting.remove(sequence)
            self._chunk(step, sequence, remaining)
        self._slices(step, candidates, remaining)
        return step

    def work(self, step: Step) -> Work:
        """Return the work of the forward pass of `step`."""
        prompts = (chunk for chunk in step.prefill if chunk.of_prompt)
        return Work(step.num_rows, sum(self._units(chunk.start, chunk.count) for chunk in prompts))

    def _decode(self, step: Step) -> None:
        """Add every running answer; those with several tokens to compute share what the others leave."""
        runs: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.prefilling:
                continue
            if len(step.decode) + len(runs) >= self.max_num_batched_tokens:
                break
            if self._room(sequence):
                (step.decode if sequence.num_pending == 1 else runs).append(sequence)
        step.decode = [sequence for sequence in step.decode if sequence.status is SequenceStatus.RUNNING]
        runs = [sequence for sequence in runs if sequence.status is SequenceStatus.RUNNING]
        budget = self.max_num_batched_tokens - len(step.decode)
        for behind, sequence in zip(reversed(range(len(runs))), runs, strict=True):
            count = min(sequence.num_pending, budget - behind, sequence.max_chunk)
            step.prefill.append(ScheduledTokens(sequence, sequence.num_computed, count))
            budget -= count
        if step.num_tokens < self.draft_rows:
            self._guess(step)

    def _guess(self, step: Step) -> None:
        """Have sequences that decode one token bring guesses of the next ones, within `draft_rows` tokens."""
        plain: list[Sequence] = []
        rows = step.num_tokens
        for sequence in step.decode:
            draft: tuple[int, ...] = ()
            if sequence.lookup is not None and sequence.slot is not None:
                room = min(sequence.slot.capacity - len(sequence.tokens), sequence.remaining - 1)
                draft = sequence.lookup.guess(sequence.tokens, min(room, self.draft_rows - rows))
            if draft:
                step.prefill.append(ScheduledTokens(sequence, sequence.num_computed, 1, draft))
                rows += len(draft)
            else:
                plain.append(sequence)
        step.decode = plain

    def _room(self, sequence: Sequence) -> bool:
        """True if the KV row has room for all tokens; may preempt the youngest sequence, even this one."""
        assert sequence.slot is not None
        while True:
            slot = self.kv.grow(sequence.slot, len(sequence.tokens), sequence.num_computed)
            if slot is not None:
                sequence.slot = slot
                return True
            youngest = max(self.running, key=ORDER)
            self.preempt(youngest)
            if youngest is sequence:
                return False

    # What a step may spend, and on whom.

    def _units(self, start: int, count: int) -> float:
        return count * (1.0 + self._key_cost * (start + count / 2))

    def _affordable(self, start: int, units: float) -> int:
        """Return how many tokens from `start` on cost at most `units`."""
        roughly = units / (1.0 + self._key_cost * start)
        return int(units / (1.0 + self._key_cost * (start + roughly / 2)))

    def _pending(self, sequence: Sequence) -> float:
        """Return the units that the pictures still take which a waiting sequence needs; 0 when it can start."""
        pending = [picture for picture in sequence.prepared.pictures if picture.features is None]
        if not pending:
            return 0.0
        known = max(self._donor(sequence)[1], self._num_kept(sequence))
        # Whatever the estimates say, a picture without features takes something.
        return sum(max(1.0, picture.cost - picture.encoded) for picture in pending if picture.end > known)

    def _candidates(self) -> list[tuple[Sequence, float]]:
        """Return who may start as soon as there is a place, in order of arrival, with the units of missing pictures."""
        places = max(0, self.max_num_seqs - len(self.running)) + AHEAD
        ready = (sequence for sequence in self.waiting if not self._waits_for_prefix(sequence))
        return [(sequence, self._pending(sequence)) for sequence in islice(ready, places)]

    def _remaining(self, step: Step, candidates: list[tuple[Sequence, float]]) -> _Remaining:
        costs = self.budget.costs
        tokens = self.max_num_batched_tokens - step.num_tokens
        prompts = [sequence for sequence in self.running if sequence.prefilling]
        prompts += [sequence for sequence, _ in candidates]
        prompt_units = sum(self._units(s.num_computed, len(s.tokens) - s.num_computed) for s in prompts)
        picture_units = sum(pictures for _, pictures in candidates)
        price, picture_price = costs.prompt or 0.0, costs.pictures or 0.0
        present = min(self.max_num_seqs, len(step.decode) + len(step.prefill) + len(prompts))
        seconds = self.budget.beside_decode(
            step.num_rows, present, prompt_units * price + picture_units * picture_price
        )
        units = min(float(tokens), seconds / price) if price else float(tokens)
        relative = picture_price / price if price else 1.0
        # Prompts that came later leave half to the pictures that came before them, so that neither waits for ever.
        reserved = min(picture_units * relative, max(units / 2, self.grain * relative))
        since = next((sequence.order for sequence, pictures in candidates if pictures), (inf, inf))
        return _Remaining(tokens, units, relative, reserved, since)

    def _chunk(self, step: Step, sequence: Sequence, remaining: _Remaining) -> None:
        units = remaining.for_prompt(sequence, step, self.grain)
        start = sequence.num_computed
        if units > 0:
            # Behind a very long context even one token may be beyond it.
            affordable = max(1, self._affordable(start, units))
            count = min(len(sequence.tokens) - start, affordable, remaining.tokens, sequence.max_chunk)
            step.prefill.append(ScheduledTokens(sequence, start, count))
            remaining.tokens -= count
            remaining.units -= self._units(start, count)

    def _slices(self, step: Step, candidates: list[tuple[Sequence, float]], remaining: _Remaining) -> None:
        """Spend what remains on pictures: first come, first served, but half of it goes to a smaller one behind."""
        looking = _different(candidates)
        left = remaining.units / remaining.picture_price
        if not looking or (left < self.grain and step.has_prompt):
            return
        first, *others = looking
        # Memory is taken already for one that has begun.
        other = min(others, key=lambda one: (not _begun(one.sequence), one.units), default=None)
        if other is not None and other.units < first.units and left >= 2 * self.grain:
            others.remove(other)
            step.pictures.append(ScheduledPictures(other.sequence, min(other.units, left / 2)))
            left -= step.pictures[-1].units
        # The first goes on by its smallest piece at least, however little time there is.
        step.pictures.append(ScheduledPictures(first.sequence, max(0.0, min(first.units, left))))
        left -= first.units
        for one in others:
            if left < self.grain:
                break
            step.pictures.append(ScheduledPictures(one.sequence, min(one.units, left)))
            left -= one.units

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """True if another sequence will soon hold much of this prompt's KV, to be copied rather than computed again.

        Choices of one request always wait for the first; prompts of different requests while it saves them enough.
        """
        leader = sequence.leader
        if leader is not None and leader.status is not SequenceStatus.FINISHED:
            return leader.num_computed < leader.num_prompt
        limit = len(sequence.tokens) - 1 if sequence.scores is None else 0
        soon = 0
        for other in self.running:
            if other.prefilling:
                soon = max(soon, min(self._common(sequence, other), limit))
        if soon < WORTH_WAITING:
            return False
        return soon - max(self._donor(sequence)[1], self._num_kept(sequence)) >= WORTH_WAITING

    def _common(self, sequence: Sequence, other: Sequence) -> int:
        """Return how many tokens of KV both begin with: all of a shared prompt, else whole blocks."""
        if other.prepared is sequence.prepared:
            return sequence.num_prompt
        if not self.prefixes.max_blocks:
            return 0
        return common_blocks(sequence.hashes.extend(sequence.tokens), other.hashes.extend(other.tokens)) * BLOCK

    def _donor(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """Return the running sequence whose row holds the most of this one's KV, and how many tokens that are."""
        donor, known = None, 0
        for other in self.running if sequence.scores is None else ():
            common = min(other.num_computed, len(sequence.tokens) - 1)
            if common > known:
                common = min(common, self._common(sequence, other))
                if common > known:
                    donor, known = other, common
        return donor, known

    def _num_kept(self, sequence: Sequence) -> int:
        """Return the tokens of this sequence's KV that are kept as prefixes."""
        if not self.prefixes.max_blocks or sequence.scores is not None:
            return 0
        return self.prefixes.count(sequence.hashes.extend(sequence.tokens), len(sequence.tokens) - 1) * BLOCK

    def _admit(self, sequence: Sequence) -> bool:
        """Allocate a KV row for a waiting sequence, filled with the cached part of its prompt; False without room."""
        total = len(sequence.tokens) + max(1, min(sequence.remaining, HEADROOM))
        slot = self.kv.allocate(min(total, self.kv.capacities[-1]))
        if slot is None:
            return False
        sequence.slot = slot
        sequence.status = SequenceStatus.RUNNING
        sequence.num_computed = self._reuse(sequence, slot)
        insort_left(self.running, sequence, key=ORDER)
        return True

    def _reuse(self, sequence: Sequence, slot: Slot) -> int:
        """Copy a running sequence's KV or a kept prefix into the row; return the tokens copied, all but one at most."""
        donor, known = self._donor(sequence)
        kept = self._num_kept(sequence)
        if donor is not None and donor.slot is not None and known >= kept:
            self.kv.copy(donor.slot, slot, known)
            if donor.prepared is sequence.prepared:
                return known
        elif kept:
            blocks = self.prefixes.match(sequence.hashes.extend(sequence.tokens), len(sequence.tokens) - 1)
            self.kv.load(blocks, slot)
            known = kept
        self.prefixes.hit_tokens += known
        if sequence.num_preempted == 0:
            sequence.num_cached = min(known, sequence.num_prompt)
        return known

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.kv.free(sequence.slot)
            sequence.slot = None
        sequence.num_computed = 0


def _different(candidates: list[tuple[Sequence, float]]) -> list[ScheduledPictures]:
    """Return who needs pictures, with all that they take; the same picture of two requests is the first's."""
    looking: list[ScheduledPictures] = []
    keys: set[str] = set()
    for sequence, units in candidates:
        mine = {picture.key for picture in sequence.prepared.pictures if picture.features is None}
        if units and not mine & keys:
            looking.append(ScheduledPictures(sequence, units))
        keys |= mine
    return looking


def _begun(sequence: Sequence) -> bool:
    return any(picture.encoding is not None for picture in sequence.prepared.pictures)
