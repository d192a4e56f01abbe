"""The scheduler of continuous batching: decides which tokens the next step computes. No torch.

A step has a time budget (see `StepBudget`): decoding sequences come first, then prompts, then slices of pictures. First
come, first served: a prompt waits until its pictures are encoded and a KV row is free, and if rows cannot grow the
youngest sequence is preempted and computed again later.

The unit of all this work is one token of a prompt; a picture counts as many as take its number of multiplications.
"""

from __future__ import annotations

from bisect import insort, insort_left
from collections import deque
from itertools import islice
from math import inf, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from qvl.backends.local.scheduling.kv_cache import KvCache, Part, Slot
from qvl.backends.local.scheduling.prefix_cache import BLOCK, PrefixIndex
from qvl.backends.local.scheduling.reuse import MOST_PARTS, PrefixSharing, Reuse
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.backends.local.scheduling.states import KeptState, SequenceStates
from qvl.backends.local.scheduling.step import ScheduledPictures, ScheduledTokens, Step
from qvl.backends.local.scheduling.step_budget import Remaining, StepBudget
from qvl.backends.local.scheduling.step_costs import StepCosts, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qvl.backends.local.text.processor import PreparedPicture

# Answers are often short: room for this many tokens beyond the prompt avoids most moves to a larger row.
HEADROOM: Final = 64
# Waiting prompts beyond the free places whose pictures are encoded already, so that the next place is not left empty.
AHEAD: Final = 2
# Tokens of a prefix under computation for which another prompt waits: for fewer it starts at once and computes its own.
WORTH_WAITING: Final = 4 * BLOCK
# Where nothing decodes, this part of a step's tokens fits into it behind any context: smaller pieces share less.
FEWEST: Final = 1 / 4
ORDER: Final = attrgetter("order")


class Scheduler:
    """Schedules all unfinished sequences: the waiting queue and the running ones.

    Args:
        kv: accounting of the KV rows.
        prefixes: the prefix cache.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: tokens of one step, decode and prefill together; bounds slices of pictures too.
        budget: time budget of the steps.
        key_cost: cost of attention to one earlier token, in units.
        draft_rows: steps that decode fewer tokens than these are filled up with guesses of text; 0 guesses nothing.
        shares: sequences can read each other's rows; else they copy what they have in common.

    Attributes:
        recall: gives pictures the features that are kept of them.
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
        *,
        shares: bool = True,
    ) -> None:
        self.kv = kv
        self.prefixes = prefixes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.budget = budget or StepBudget(StepCosts())
        # Smaller pieces of a prompt or a picture cost more than they are worth.
        self.grain = max(1, max_num_batched_tokens // 32)
        # Prompts must go on beside them.
        # A state cannot go back to before a guess that was wrong.
        self.draft_rows = 0 if kv.state_tokens else min(draft_rows, max_num_batched_tokens // 4)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.sharing = PrefixSharing(kv, prefixes, shares=shares)
        self.recall: Callable[[Iterable[PreparedPicture]], None] = lambda _: None
        self._key_cost = key_cost
        self._shrink = False

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the waiting queue, behind those of its priority."""
        insort(self.waiting, sequence, key=ORDER)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence that ended or was aborted, and keep its KV; does nothing if it is already removed."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self.sharing.keep(sequence)
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
        if self._shrink:
            self._shrink = False
            self.kv.release_unused()
        for sequence in self.running:
            sequence.num_ready = sequence.num_scheduled = sequence.num_computed
        self._decode(step)
        candidates = self._candidates()
        remaining = self._remaining(step, candidates)
        for sequence in [one for one in self.running if one.prefilling]:
            self._chunk(step, sequence, remaining)
            if sequence.num_scheduled >= sequence.num_prompt:
                # Who waited for this prompt can join it.
                candidates = self._candidates()
        for sequence, pictures in candidates:
            if len(self.running) >= self.max_num_seqs or not remaining.for_prompt(sequence, step, self.grain):
                break
            # One that was admitted just now may compute what this one begins with, or have taken over the row with it.
            if pictures or self._waits_for_prefix(sequence) or self._pending(sequence):
                continue
            if not self._admit(sequence, step):
                break
            self.waiting.remove(sequence)
            self._chunk(step, sequence, remaining)
            # Who were admitted to a full step would share no more than what it computes of this one.
            if sequence.num_scheduled < min(len(sequence.tokens), sequence.num_computed + sequence.max_chunk):
                break
        self._slices(step, candidates, remaining)
        return step

    def commit(self, step: Step) -> None:
        """Note that the forward pass of `step` is done."""
        for sequence in step.decode:
            self._advance(sequence, len(sequence.tokens))
        for chunk in step.prefill:
            self._advance(chunk.sequence, chunk.end)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        sequence.num_computed = computed
        if sequence.states is not None:
            sequence.states.advance(self.kv)

    def release_prefixes(self) -> None:
        """Give all kept prefixes away, and their memory back before the next step."""
        self.prefixes.clear()
        self._shrink = True

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
        # Guesses leave half of a step to prompts.
        kept = self.max_num_batched_tokens // 2
        for behind, sequence in zip(reversed(range(len(runs))), runs, strict=True):
            count = min(sequence.num_pending, budget - behind, sequence.max_chunk)
            draft = self._expected(sequence, sequence.num_computed + count, budget - behind - count - kept)
            step.prefill.append(ScheduledTokens(sequence, sequence.num_computed, count, draft))
            budget -= count + len(draft)
        if self.draft_rows:
            self._guess(step, self.max_num_batched_tokens - kept)

    def _expected(self, sequence: Sequence, end: int, limit: int) -> tuple[int, ...]:
        """Return the guesses of its grammar that a chunk up to `end` brings, at most `limit`.

        They are nearly always right, so each takes a row now that it would take later: busy steps have them too.
        """
        if not (self.draft_rows and sequence.expected) or end < len(sequence.tokens):
            return ()
        return sequence.expected[: max(0, min(limit, self._free(sequence)))]

    def _free(self, sequence: Sequence) -> int:
        """Return how many guesses may stand behind a sequence's tokens, in its row and in what it may still write."""
        assert sequence.slot is not None
        return min(sequence.slot.capacity + sequence.base - len(sequence.tokens), sequence.remaining - 1)

    def _guess(self, step: Step, most: int) -> None:
        """Have sequences that decode one token bring guesses, within `most` tokens; of text within `draft_rows`."""
        plain: list[Sequence] = []
        rows = step.num_tokens
        for sequence in step.decode:
            draft = self._expected(sequence, len(sequence.tokens), most - rows)
            if sequence.lookup is not None and rows < self.draft_rows:
                draft = sequence.lookup.guess(sequence.tokens, min(self._free(sequence), self.draft_rows - rows))
            if draft:
                step.prefill.append(ScheduledTokens(sequence, sequence.num_computed, 1, draft))
                rows += len(draft)
            else:
                plain.append(sequence)
        step.decode = plain

    def _room(self, sequence: Sequence) -> bool:
        """True if the KV row has room for all tokens; may preempt the youngest sequence, even this one."""
        while True:
            if self._grow(sequence):
                return True
            youngest = max(self.running, key=ORDER)
            self.preempt(youngest)
            if youngest is sequence:
                return False

    def _grow(self, sequence: Sequence) -> bool:
        """Give a sequence a row for all of its tokens; False without room."""
        slot, own = sequence.slot, sequence.num_computed - sequence.base
        assert slot is not None
        tokens = len(sequence.tokens) - sequence.base
        if tokens <= slot.capacity:
            return True
        if slot.holders > 1 and self.sharing.shares and len(sequence.shared) < MOST_PARTS:
            # Others read the row, so it stays, and the sequence goes on in another one.
            behind = self._allocate(tokens - own + min(sequence.remaining, HEADROOM))
            if behind is not None:
                sequence.shared, sequence.slot = (*sequence.shared, Part(slot, own)), behind
            return behind is not None
        while (larger := self.kv.grow(slot, tokens, own)) is None:
            if not self.prefixes.make_room(self.kv.capacity_for(tokens)):
                return False
        sequence.slot = larger
        return True

    def _allocate(self, tokens: int) -> Slot | None:
        """Return a row for `tokens` tokens, for which kept prefixes are given away; None without room."""
        while (slot := self.kv.allocate(tokens)) is None:
            if not self.prefixes.make_room(self.kv.capacity_for(tokens)):
                return None
        return slot

    # What a step may spend, and on whom.

    def _units(self, start: int, count: int) -> float:
        return count * (1.0 + self._key_cost * (start + count / 2))

    def _affordable(self, start: int, units: float) -> int:
        """Return how many tokens from `start` on cost at most `units`."""
        first = 1.0 + self._key_cost * start
        return int(2 * units / (first + sqrt(first * first + 2 * self._key_cost * units)))

    def _pending(self, sequence: Sequence) -> float:
        """Return the units that the pictures still take which a waiting sequence needs; 0 when it can start."""
        pending = [picture for picture in sequence.prepared.pictures if picture.features is None]
        if not pending:
            return 0.0
        known = self._reuse(sequence).known
        # Whatever the estimates say, a picture without features takes something.
        return sum(max(1.0, picture.cost - picture.encoded) for picture in pending if picture.end > known)

    def _candidates(self) -> list[tuple[Sequence, float]]:
        """Return who may start as soon as there is a place, in order of arrival, with the units of missing pictures."""
        places = max(0, self.max_num_seqs - len(self.running)) + AHEAD
        ready = (sequence for sequence in self.waiting if not self._waits_for_prefix(sequence))
        candidates = list(islice(ready, places))
        for sequence in candidates:
            self.recall(sequence.prepared.pictures)
        return [(sequence, self._pending(sequence)) for sequence in candidates]

    def _remaining(self, step: Step, candidates: list[tuple[Sequence, float]]) -> Remaining:
        costs = self.budget.costs
        tokens = self.max_num_batched_tokens - step.num_tokens
        prompts = [sequence for sequence in self.running if sequence.prefilling]
        prompts += [sequence for sequence, _ in candidates]
        prompt_units = sum(self._units(s.num_computed, len(s.tokens) - s.num_computed) for s in prompts)
        picture_units = sum(pictures for _, pictures in candidates)
        price, picture_price = costs.prompt or 0.0, costs.pictures or 0.0
        present = min(self.max_num_seqs, len(step.decode) + len(step.prefill) + len(prompts))
        backlog = prompt_units * price + picture_units * picture_price
        seconds = self.budget.beside_decode(step.num_rows, present, backlog)
        longest = max((len(s.tokens) for s in prompts), default=0)
        most = tokens * (1.0 if step.num_rows else max(1.0, FEWEST * (1.0 + self._key_cost * longest)))
        units = min(most, seconds / price) if price else most
        relative = picture_price / price if price else 1.0
        # Prompts that came later leave half to the pictures that came before them, so that neither waits for ever.
        reserved = min(picture_units * relative, max(units / 2, self.grain * relative))
        since = next((sequence.order for sequence, pictures in candidates if pictures), (inf, inf))
        return Remaining(tokens, units, relative, reserved, since)

    def _chunk(self, step: Step, sequence: Sequence, remaining: Remaining) -> None:
        units = remaining.for_prompt(sequence, step, self.grain)
        start = sequence.num_computed
        if units > 0:
            # Behind a very long context even one token may be beyond it.
            affordable = max(1, self._affordable(start, units))
            count = min(len(sequence.tokens) - start, affordable, remaining.tokens, sequence.max_chunk)
            draft = self._expected(sequence, start + count, remaining.tokens - count)
            step.prefill.append(ScheduledTokens(sequence, start, count, draft))
            sequence.num_scheduled = start + count
            remaining.tokens -= count + len(draft)
            remaining.units -= self._units(start, count)

    def _slices(self, step: Step, candidates: list[tuple[Sequence, float]], remaining: Remaining) -> None:
        """Spend what remains on pictures: first come, first served, but half of it goes to a smaller one behind."""
        looking = _different(candidates)
        # Not what the tokens leave: prompts that came later may take all of them.
        left = min(remaining.units, self.max_num_batched_tokens) / remaining.picture_price
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
        """True if another sequence will soon hold much of this prompt's KV, which would be computed again.

        Choices of one request always wait for the first; prompts of different requests while it saves them enough.
        """
        leader = sequence.leader
        limit = len(sequence.tokens) - 1 if sequence.scores is None else 0
        if leader is not None and leader.status is not SequenceStatus.FINISHED:
            there = leader.num_computed >= leader.num_prompt
            return not there and self._reuse(sequence).known < min(sequence.num_prompt, limit)
        computing = [other for other in self.running if other.prefilling]
        if not computing or limit < WORTH_WAITING:
            return False
        most = max(self.sharing.common(sequence, other, limit) for other in computing)
        return most >= WORTH_WAITING and most >= self._reuse(sequence).known + WORTH_WAITING

    def _reuse(self, sequence: Sequence) -> Reuse:
        return self.sharing.best(sequence, self.running, self._headroom(sequence))

    @staticmethod
    def _headroom(sequence: Sequence) -> int:
        return max(1, min(sequence.remaining, HEADROOM))

    def _admit(self, sequence: Sequence, step: Step) -> bool:
        """Give a waiting sequence a KV row, and what others have of its prompt; False without room."""
        reuse = self._reuse(sequence)
        if reuse.state is not None:
            self.kv.hold_state(reuse.state)
        if reuse.taken and reuse.source is not None:
            *_, own = self.prefixes.take(reuse.source)
            slot: Slot | None = own.slot
            for mark in reuse.source.states:
                self.kv.free_state(mark.state)
        else:
            slot = self._row_behind(sequence, reuse)
        if slot is None and not self.running:
            # Then kept prefixes have the memory, the very one that was to be read among them.
            self.prefixes.clear()
            if reuse.state is not None:
                self.kv.free_state(reuse.state)
            reuse = Reuse()
            slot = None if self._pending(sequence) else self._row_behind(sequence, reuse)
        if slot is None:
            if reuse.state is not None:
                self.kv.free_state(reuse.state)
            return False
        sequence.slot, sequence.shared = slot, reuse.shared
        sequence.compared.clear()
        sequence.found = None
        if self.kv.state_tokens and not self._give_states(sequence, reuse):
            self._release(sequence)
            return False
        sequence.status = SequenceStatus.RUNNING
        sequence.num_computed = sequence.num_scheduled = reuse.known
        sequence.num_ready = reuse.ready
        insort_left(self.running, sequence, key=ORDER)
        if reuse.ready < reuse.known:
            step.joined.append(sequence)
        if reuse.counted:
            self.prefixes.hit_tokens += reuse.known
            if sequence.num_preempted == 0:
                sequence.num_cached = min(reuse.known, sequence.num_prompt)
        return True

    def _give_states(self, sequence: Sequence, reuse: Reuse) -> bool:
        """Give an admitted sequence its states, for which kept prefixes are given away; False without room.

        What others may begin with too is kept: up to where one parted from it, and the whole prompt but its end.
        """
        ends = {reuse.common, sequence.num_prompt - 1} if self.prefixes.limit else set()
        places = {end // BLOCK * BLOCK for end in ends}
        places = {place for place in places if place >= max(reuse.known + 1, BLOCK)}
        start = None if reuse.state is None else KeptState(reuse.known, reuse.state)
        while (states := SequenceStates.take(self.kv, start, places)) is None:
            if not self.prefixes.make_room(self.kv.state_tokens):
                if start is not None:
                    self.kv.free_state(start.state)
                return False
        sequence.states = states
        return True

    def _row_behind(self, sequence: Sequence, reuse: Reuse) -> Slot | None:
        """Hold the rows that are shared and return one for the rest, with what is copied; None without room."""
        # Held first: making room may give away the prefix that they belong to.
        held = [part.slot for part in (*reuse.shared, *reuse.copied)]
        for slot in held:
            self.kv.hold(slot)
        if reuse.source is not None:
            self.prefixes.touch(reuse.source)
        base = sum(part.tokens for part in reuse.shared)
        tokens = len(sequence.tokens) - base + self._headroom(sequence)
        row = self._allocate(min(tokens, self.kv.capacities[-1]))
        done = 0
        for part in reuse.copied if row is not None else ():
            assert row is not None
            self.kv.copy(part.slot, row, part.tokens, done)
            done += part.tokens
        for slot in held if row is None else held[len(reuse.shared) :]:
            self.kv.free(slot)
        return row

    def _release(self, sequence: Sequence) -> None:
        for slot in [part.slot for part in sequence.shared] + ([] if sequence.slot is None else [sequence.slot]):
            self.kv.free(slot)
        if sequence.states is not None:
            sequence.states.free(self.kv)
        sequence.slot, sequence.shared, sequence.states = None, (), None
        sequence.num_computed = sequence.num_ready = sequence.num_scheduled = 0


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
