"""Scheduler, sequences, rows and prefixes hold their promises for any course of events; no torch is needed."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qvl
from qvl.backends.local.scheduling.kv_cache import Copy, KvCache, Part, Resize, Slot, capacities
from qvl.backends.local.scheduling.prefix_cache import (
    BLOCK,
    BlockHashes,
    Prefix,
    PrefixIndex,
    common_blocks,
    common_tokens,
)
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
from qvl.backends.local.scheduling.step import Step
from qvl.backends.local.text.processor import PreparedPicture, PreparedRequest
from qvl.types import SamplingParams


def sequence(length: int, max_tokens: int, arrival: int, *, first: int = 0) -> Sequence:
    prepared = PreparedRequest([first + i % 50 for i in range(length)], np.zeros((3, length), dtype=np.int64), 0, ())
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(None, 0, prepared, sampling, arrival, seed=arrival)


def force(member: Sequence, dice: random.Random) -> None:
    """Appends some tokens that no step has chosen, as a grammar does; at the beginning, one is left to choose."""
    for _ in range(dice.choice((0, 0, 1, 4, 40))):
        if member.remaining > (member.num_computed == 0):
            member.append(dice.randrange(50))


def right(member: Sequence, step: Step, dice: random.Random) -> None:
    """Takes the first of the tokens that were guessed, some or all, whose KV is there already."""
    for chunk in step.prefill:
        if chunk.sequence is member and chunk.draft:
            for token in chunk.draft[: dice.randrange(len(chunk.draft) + 1)]:
                member.append(token)
                member.num_computed += 1


@dataclass
class Memory:
    """Plays the runner: what each row really holds, so that a lost or mixed-up prefix shows."""

    rows: dict[tuple[int, int], list[int | None]] = field(default_factory=dict)

    def apply(self, kv: KvCache) -> None:
        for op in kv.take_ops():
            if isinstance(op, Resize):
                for key in [key for key in self.rows if key[0] == op.pool and key[1] >= op.rows]:
                    del self.rows[key]
                for row in range(op.rows):
                    self.rows.setdefault((op.pool, row), [None] * abs(op.pool))
            elif isinstance(op, Copy):
                self.rows[op.target][op.start : op.start + op.tokens] = self.rows[op.source][: op.tokens]

    def held(self, member: Sequence, end: int) -> list[int | None]:
        """What lies where the first `end` tokens of a sequence are looked for."""
        assert member.slot is not None
        own = Part(member.slot, end - member.base)
        return [token for slot, tokens in (*member.shared, own) for token in self.rows[slot.pool, slot.row][:tokens]]

    def run(self, step: Step) -> list[Sequence]:
        """Writes the KV of the step; behind it, every position must hold the sequence's own token."""
        drafts = {chunk.sequence: chunk.draft for chunk in step.prefill}
        parts = [(s, len(s.tokens) - 1, len(s.tokens)) for s in step.decode]
        parts += [(chunk.sequence, chunk.start, chunk.end) for chunk in step.prefill]
        for member, start, end in parts:
            assert member.slot is not None
            base = member.base
            assert base <= start
            assert end - base <= member.slot.capacity
            row = self.rows[member.slot.pool, member.slot.row]
            row[start - base : end - base] = member.tokens[start:end]
            row[end - base : end - base + len(drafts.get(member, ()))] = drafts.get(member, ())
        sampled = []
        for member, _, end in parts:
            assert self.held(member, end) == member.tokens[:end]
            member.num_computed = end
            if end == len(member.tokens):
                sampled.append(member)
        return sampled


def scheduler_of(
    budget: int, longest: int, seqs: int, batched: int, *, kept: int = 0, smallest: int = 256, shares: bool = True
) -> Scheduler:
    kv = KvCache(budget, longest, smallest)
    return Scheduler(kv, PrefixIndex(kv, kept), seqs, batched, shares=shares)


requests = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=24)


@settings(max_examples=120, deadline=None)
@given(
    wanted=requests,
    budget=st.integers(384, 4000),
    seqs=st.integers(1, 8),
    batched=st.integers(9, 200),
    kept=st.sampled_from([0, 100, 1300, 4000]),
    shares=st.booleans(),
    guesses=st.sampled_from([0, 8, 32]),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_and_nothing_leaks_whatever_happens(
    wanted: list[tuple[int, int]],
    budget: int,
    seqs: int,
    batched: int,
    kept: int,
    shares: bool,
    guesses: int,
    seed: int,
) -> None:
    dice = random.Random(seed)
    kv = KvCache(budget, max_tokens=360, smallest=32)
    prefixes = PrefixIndex(kv, kept)
    scheduler = Scheduler(kv, prefixes, seqs, batched, draft_rows=guesses, shares=shares)
    memory = Memory()
    todo = [sequence(n, m, place, first=dice.randrange(3)) for place, (n, m) in enumerate(wanted)]
    living: list[Sequence] = []
    for _ in range(20_000):
        while todo and dice.random() < 0.5:
            living.append(todo.pop(0))
            scheduler.add(living[-1])
            force(living[-1], dice)
        if living and dice.random() < 0.02:
            aborted = living.pop(dice.randrange(len(living)))
            scheduler.finish(aborted)
            assert (aborted.slot, aborted.shared) == (None, ())
        step = scheduler.schedule()
        assert step.num_tokens <= batched
        assert len(scheduler.running) <= seqs
        assert kv.reserved <= kv.budget
        assert kv.allocated_tokens <= kv.reserved
        assert prefixes.num_tokens <= kept
        written = {s.slot for s in scheduler.running if s.slot is not None}
        read = {part.slot for s in scheduler.running for part in s.shared}
        assert len(written) == len(scheduler.running), "each writes a row of its own"
        assert kv.num_slots == len(written | read) + prefixes.num_idle
        assert shares or not read
        assert step or not (scheduler.waiting or scheduler.running), "something waits and nothing runs"
        memory.apply(kv)
        if dice.random() < 0.03:  # the device ran out of memory in this step
            scheduler.release_prefixes()
            for member in step.joined:
                scheduler.preempt(member)
            continue
        for member in memory.run(step):
            right(member, step, dice)
            member.append(dice.randrange(50))
            force(member, dice)
            if member.remaining <= 0:
                scheduler.finish(member)
                living.remove(member)
        if not (todo or living):
            break
    assert not todo
    assert not living
    assert not scheduler.waiting
    assert not scheduler.running
    assert kv.num_slots == prefixes.num_idle
    assert kv.allocated_tokens == prefixes.idle_tokens == prefixes.num_tokens
    prefixes.clear()
    assert kv.num_slots == 0
    kv.release_unused()
    assert kv.reserved == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 512)), max_size=60), st.integers(512, 4096))
def test_rows_are_never_shared_and_the_budget_is_kept(events: list[tuple[int, int]], budget: int) -> None:
    kv = KvCache(budget, 512, smallest=32)
    held: list[Slot] = []
    for kind, tokens in events:
        if kind == 0 and (slot := kv.allocate(tokens)) is not None:
            assert slot.capacity >= tokens
            held.append(slot)
        elif kind == 1 and held:
            kv.free(held.pop(tokens % len(held)))
        elif kind == 2 and held and (grown := kv.grow(held[-1], tokens, min(tokens, 8))) is not None:
            assert grown.capacity >= tokens
            held[-1] = grown
        assert kv.reserved <= kv.budget
        assert len({(slot.capacity, slot.row) for slot in held}) == len(held) == kv.num_slots


def test_rows_double_up_to_the_longest_sequence() -> None:
    assert capacities(5000) == (256, 512, 1024, 2048, 4096, 5120)
    assert capacities(100) == (256,)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=6), max_size=20), st.integers(1, 8), st.integers(0, 31)
)
def test_a_kept_prefix_is_the_longest_one_and_holds_its_own_tokens(
    chains: list[list[int]], size: int, more: int
) -> None:
    kv = KvCache(100_000, 512, smallest=256)
    index = PrefixIndex(kv, 256 * size)
    kept: list[list[int]] = []
    for chain in chains:
        tokens = [word for word in chain for _ in range(BLOCK)] + [7] * more
        hashes = BlockHashes(())
        found, known = index.find(hashes, tokens, len(tokens))
        if found is not None:
            assert found.tokens[:known] == tokens[:known]
            assert known >= BLOCK
        slot = kv.allocate(max(1, len(tokens)))
        assert slot is not None
        index.keep(Prefix(tokens, len(tokens), hashes, (Part(slot, len(tokens)),)))
        kept.append(tokens)
        assert len(index) <= size
        assert kv.num_slots == len(index), "what is not kept is free"
        if len(tokens) >= BLOCK:
            assert index.find(BlockHashes(()), tokens, len(tokens))[1] >= len(tokens) // BLOCK * BLOCK
    index.clear()
    assert kv.num_slots == 0


def test_a_prefix_is_given_away_before_those_whose_rows_it_reads_and_these_stay_while_they_are_read() -> None:
    kv = KvCache(4096, 1024, smallest=32)
    index = PrefixIndex(kv, 4096)
    long = [*range(320)]
    first = kv.allocate(320)
    assert first is not None
    index.keep(Prefix(long, 320, BlockHashes(()), (Part(first, 320),)))
    for place in range(3):
        found, known = index.find(BlockHashes(()), long, 320)
        assert (found is not None, known) == (True, 320)
        own = kv.allocate(32)
        assert own is not None
        kv.hold(first)
        tokens = long + [1000 + place] * 32
        index.keep(Prefix(tokens, 352, BlockHashes(()), (Part(first, 320), Part(own, 32))))
    assert first.holders == 4
    kv.hold(first)  # a sequence that runs
    assert index.make_room(32)
    assert len(index) == 3
    assert index.find(BlockHashes(()), long, 320)[1] == 320
    assert index.make_room(1024)
    assert len(index) == 0
    assert (first.holders, kv.num_slots) == (1, 1), "what is read is not given away"
    kv.free(first)
    assert kv.num_slots == 0


def test_another_picture_or_another_place_is_another_prefix() -> None:
    tokens = [5] * (3 * BLOCK)
    plain = BlockHashes(()).extend(tokens)
    seen = BlockHashes([PreparedPicture("a", (8, 8), 40, 16)]).extend(tokens)
    other = BlockHashes([PreparedPicture("b", (8, 8), 40, 16)]).extend(tokens)
    moved = BlockHashes([PreparedPicture("a", (8, 8), 41, 16)]).extend(tokens)
    assert plain[0] == seen[0] == other[0] == moved[0]
    assert len({plain[1], seen[1], other[1], moved[1]}) == 4
    assert len({plain[2], seen[2], other[2], moved[2]}) == 4


@pytest.mark.parametrize(
    ("other", "common"),
    [([("a", 4, 62)], 70), ([("a", 4, 62), ("b", 67, 2)], 67), ([("b", 4, 62)], 4), ([], 4)],
    ids=["the same", "one more", "another", "none"],
)
def test_equal_pictures_are_common_to_the_token(other: list[tuple[str, int, int]], common: int) -> None:
    def shown(pictures: list[tuple[str, int, int]]) -> BlockHashes:
        return BlockHashes([PreparedPicture(key, (8, 8), start, count) for key, start, count in pictures])

    tokens = [5] * 70
    one, two = shown([("a", 4, 62)]), shown(other)
    blocks = common_blocks(one.extend(tokens), two.extend(tokens))
    assert common_tokens(one, tokens, two, tokens, 70, blocks) == common


def test_a_long_prompt_does_not_stall_running_answers() -> None:
    scheduler = scheduler_of(60_000, 20_000, 4, 64)
    memory = Memory()
    short, long = sequence(10, 500, 0), sequence(16_384, 4, 1)
    scheduler.add(short)
    scheduler.add(long)
    steps = 0
    while long.num_output == 0:
        step = scheduler.schedule()
        memory.apply(scheduler.kv)
        assert step.num_tokens <= 64
        for member in memory.run(step):
            member.append(1)
        steps += 1
    assert steps >= 16_384 // 64
    assert short.num_output >= steps - 1


def test_forced_tokens_pass_in_one_step_with_the_token_that_they_follow_and_before_prompts() -> None:
    scheduler = scheduler_of(4096, 1024, 4, 16, smallest=32)
    memory = Memory()
    first, second = sequence(8, 200, 0), sequence(8, 200, 1)
    for member in (first, second):
        scheduler.add(member)

    def step() -> Step:
        made = scheduler.schedule()
        memory.apply(scheduler.kv)
        for member in memory.run(made):
            member.append(7)
        return made

    assert step().num_tokens == 16
    for token in range(5):
        first.append(token)
    scheduler.add(sequence(100, 5, 2))
    made = step()
    assert made.decode == [second]
    assert [(chunk.sequence.arrival, chunk.start, chunk.count) for chunk in made.prefill] == [(0, 8, 6), (2, 0, 9)]
    # Runs longer than a step's budget share it, and nobody who brings one token waits for them.
    capacity = first.slot.capacity if first.slot else 0
    for token in range(149):
        first.append(token)
    steps = [step() for _ in range(10)]
    assert all(made.decode == [second] for made in steps)
    assert [made.prefill[0].count for made in steps] == [15] * 10
    assert step().decode == [first, second]
    assert first.slot is not None
    assert first.slot.capacity > capacity
    assert second.num_output == 13


def test_a_prompt_whose_picture_is_being_encoded_takes_nothing_from_the_others() -> None:
    scheduler = scheduler_of(10_000, 1000, 8, 64)
    memory = Memory()
    picture = PreparedPicture("a", (16, 16), 30, 64, cost=90.0)
    seeing = sequence(200, 5, 0)
    seeing.prepared = PreparedRequest(seeing.prepared.tokens, seeing.prepared.positions, 0, (picture,))
    choice = sequence(200, 5, 1)
    choice.prepared, choice.leader = seeing.prepared, seeing
    blind = sequence(100, 5, 2)
    for member in (seeing, choice, blind):
        scheduler.add(member)
    computed: dict[int, int] = {}
    for _ in range(6):
        step = scheduler.schedule()
        assert [part.sequence for part in step.pictures] == [seeing]
        memory.apply(scheduler.kv)
        for chunk in step.prefill:
            computed[chunk.sequence.arrival] = chunk.end
        for member in memory.run(step):
            member.append(3)
    assert computed == {2: 100}, "all of the one that came later"
    assert blind.num_output > 1
    assert seeing.slot is None, "no row is taken while the picture is encoded"
    picture.features = object()
    while seeing.num_output == 0:
        step = scheduler.schedule()
        memory.apply(scheduler.kv)
        for member in memory.run(step):
            member.append(3)
    assert choice.num_output == 1, "its choices join it in the same step"


def test_choices_of_one_request_share_one_prefill() -> None:
    scheduler = scheduler_of(10_000, 1000, 8, 256)
    memory = Memory()
    leader = sequence(200, 5, 0)
    others = [sequence(200, 5, place) for place in (1, 2)]
    for other in others:
        other.prepared, other.leader = leader.prepared, leader
    for member in (leader, *others):
        scheduler.add(member)
    computed = 0
    for _ in range(3):
        step = scheduler.schedule()
        memory.apply(scheduler.kv)
        computed += sum(chunk.count for chunk in step.prefill)
        for member in memory.run(step):
            member.append(3)
    assert all(member.status is SequenceStatus.RUNNING for member in others)
    assert computed == 200 + 1 + 1


def prompt(common: int, own: int, arrival: int, salt: str = "", answer: int = 5) -> Sequence:
    """A prompt of `common` tokens that all begin with and `own` tokens that no other has."""
    tokens = [*range(common), *(1000 * (arrival + 1) + place for place in range(own))]
    prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, (), salt=salt)
    return Sequence(None, 0, prepared, SamplingParams(max_tokens=answer), arrival, seed=0)


@dataclass
class Ran:
    """What running some prompts took."""

    computed: int = 0
    copied: int = 0
    steps: int = 0
    most_rows: int = 0


def run_all(scheduler: Scheduler, members: list[Sequence], memory: Memory | None = None) -> Ran:
    """Run all to their ends."""
    memory, ran = memory or Memory(), Ran()
    for member in members:
        scheduler.add(member)
    while scheduler.waiting or scheduler.running:
        step = scheduler.schedule()
        ran.copied += sum(op.tokens for op in scheduler.kv.ops if isinstance(op, Copy))
        ran.most_rows = max(ran.most_rows, scheduler.kv.allocated_tokens)
        memory.apply(scheduler.kv)
        ran.computed += sum(chunk.count for chunk in step.prefill)
        ran.steps += 1
        for member in memory.run(step):
            member.append(3 + member.arrival)
            if member.remaining <= 0:
                scheduler.finish(member)
    return ran


def test_prompts_that_start_in_one_step_compute_their_common_prefix_once_and_hold_it_once() -> None:
    members = [prompt(300, 20, place) for place in range(6)]
    scheduler = scheduler_of(20_000, 1000, 8, 4000, kept=2000)
    ran = run_all(scheduler, members)
    assert (ran.computed, ran.copied) == (320 + 5 * 20, 0), "to the token, and nothing is copied"
    assert ran.steps == 5, "in the first step already"
    assert ran.most_rows == 512 + 5 * 256
    assert [member.num_cached for member in members] == [0, *[300] * 5]
    assert scheduler.prefixes.hit_tokens == 5 * 300


def test_orders_of_a_question_share_its_text_behind_a_long_context_too() -> None:
    questions, orders, context, text, own = 20, 4, 2000, 30, 22
    members = []
    for number in range(questions):
        for order in range(orders):
            at = 10_000 * (number + 1) + 1000 * order
            tokens = [
                *range(context),
                *range(at - 1000 * order, at - 1000 * order + text),
                *range(at + 100, at + 100 + own),
            ]
            prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, ())
            members.append(Sequence(None, 0, prepared, SamplingParams(max_tokens=1), len(members), seed=0))
    kv = KvCache(100_000, 4000, 256)
    # A token behind the context takes eleven times as long as the first.
    scheduler = Scheduler(kv, PrefixIndex(kv, 20_000), 32, 512, key_cost=0.005)
    ran = run_all(scheduler, members)
    least = context + questions * (text + orders * own)
    assert ran.computed <= 1.02 * least, f"{ran.computed} tokens for {least}"
    assert ran.steps <= 50


def test_who_loses_the_row_that_held_its_picture_waits_for_the_picture() -> None:
    def about(*pictures: PreparedPicture, tail: int, arrival: int) -> Sequence:
        shown = [1] * sum(picture.num_tokens for picture in pictures)
        tokens = [*range(10, 310), *shown, *range(tail, tail + 9)]
        prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, pictures)
        return Sequence(None, 0, prepared, SamplingParams(max_tokens=1), arrival, seed=0)

    def picture() -> PreparedPicture:
        return PreparedPicture("a", (8, 6), 300, 12, cost=10.0)

    scheduler = scheduler_of(20_000, 1000, 8, 4000, kept=4000)
    first, other = about(picture(), tail=1000, arrival=0), about(tail=2000, arrival=1)
    same = about(picture(), tail=3000, arrival=2)
    first.prepared.pictures[0].features = object()
    run_all(scheduler, [first])
    scheduler.add(other)
    scheduler.add(same)
    step = scheduler.schedule()
    assert [chunk.sequence for chunk in step.prefill] == [other], "which goes on in the first one's row"
    scheduler.commit(step)
    other.append(3)
    scheduler.finish(other)
    assert [part.sequence for part in scheduler.schedule().pictures] == [same]


def test_a_long_prompt_gets_its_picture_encoded_beside_prompts_that_keep_coming() -> None:
    # Attention to so many keys makes a step's time far longer than its tokens say: these must not use all of it up.
    scheduler = scheduler_of(200_000, 8000, 8, 1000)
    scheduler._key_cost = 0.02
    picture = PreparedPicture("a", (2, 2), 4, 324, cost=2000.0)
    prepared = PreparedRequest([1] * 4000, np.zeros((3, 4000), dtype=np.int64), 0, (picture,))
    scheduler.add(Sequence(None, 0, prepared, SamplingParams(max_tokens=1), 0, seed=0))
    for arrival in range(1, 16):
        scheduler.add(sequence(500, 1, arrival, first=1000 * arrival))
    units = 0.0
    for _ in range(3):
        step = scheduler.schedule()
        assert sum(chunk.count for chunk in step.prefill) >= 500, "nor do they wait for the picture"
        units += sum(part.units for part in step.pictures)
        scheduler.commit(step)
        for chunk in step.prefill:
            if chunk.samples:
                scheduler.finish(chunk.sequence)
    assert units >= 1000


def test_what_decodes_does_not_wait_longer_because_a_prompt_is_long() -> None:
    scheduler = scheduler_of(200_000, 8000, 8, 1000)
    scheduler._key_cost = 0.02
    answering, long = sequence(10, 50, 0), sequence(4000, 1, 1, first=1000)
    scheduler.add(answering)
    scheduler.commit(scheduler.schedule())
    answering.append(3)
    scheduler.add(long)
    while long.num_computed < len(long.tokens):
        step = scheduler.schedule()
        assert step.decode == [answering]
        [chunk] = step.prefill
        assert scheduler._units(chunk.start, chunk.count) <= 1000
        scheduler.commit(step)
        answering.append(3)


def test_where_rows_cannot_be_shared_prefixes_are_copied_one_step_later() -> None:
    members = [prompt(300, 20, place) for place in range(6)]
    scheduler = scheduler_of(20_000, 1000, 8, 4000, kept=4000, shares=False)
    memory = Memory()
    ran = run_all(scheduler, members, memory)
    assert (ran.computed, ran.copied) == (320 + 5 * 20, 5 * 300 + 324), "and the first was kept"
    again = prompt(300, 20, 2)
    assert run_all(scheduler, [again], memory).computed == 1
    assert again.num_cached == 319


def test_short_prefixes_are_copied_unless_the_answer_is_shorter() -> None:
    scheduler, memory = scheduler_of(20_000, 1000, 8, 4000, kept=4000), Memory()
    run_all(scheduler, [prompt(200, 40, 0)], memory)
    assert run_all(scheduler, [prompt(200, 40, 1, answer=250)], memory).copied == 200
    assert run_all(scheduler, [prompt(200, 40, 2, answer=1)], memory).copied == 0


def test_what_another_joined_in_this_very_step_is_not_copied_before_it_is_computed() -> None:
    first, short, long = (prompt(40, 200, place, answer=answer) for place, answer in enumerate((5, 2, 250)))
    long.tokens[:] = short.tokens[:100] + long.tokens[100:]
    long.prepared.tokens[:] = long.tokens
    scheduler = scheduler_of(20_000, 1000, 8, 4000, kept=4000)
    run_all(scheduler, [first, short, long])
    assert short.num_cached == 40
    assert long.num_cached == 0


def test_a_conversation_goes_on_in_its_own_row() -> None:
    scheduler, memory = scheduler_of(20_000, 4000, 8, 4000, kept=9000), Memory()
    first = prompt(300, 20, 0)
    run_all(scheduler, [first], memory)
    tokens = [*first.tokens, *range(5000, 5040)]
    prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, ())
    second = Sequence(None, 0, prepared, SamplingParams(max_tokens=5), 1, seed=0)
    ran = run_all(scheduler, [second], memory)
    assert (ran.computed, ran.copied, ran.most_rows) == (41, 0, 512)
    assert second.num_cached == 324


def test_a_row_that_others_read_stays_when_its_sequence_outgrows_it() -> None:
    scheduler, memory = scheduler_of(20_000, 4000, 8, 4000, kept=0), Memory()
    first, second = prompt(400, 20, 0, answer=200), prompt(400, 20, 1, answer=200)
    second.prepared = first.prepared
    second.tokens, second.leader = list(first.tokens), first
    ran = run_all(scheduler, [first, second], memory)
    assert (ran.computed, ran.copied, ran.most_rows) == (421, 0, 512 + 2 * 256)
    assert first.num_output == second.num_output == 200


def test_a_prompt_starts_as_soon_as_the_prefix_that_it_waits_for_is_there() -> None:
    """And not only when all of the other prompt is."""
    first, second = prompt(400, 700, 0), prompt(400, 20, 1)
    first.max_chunk = 60
    scheduler, memory = scheduler_of(20_000, 1200, 8, 100, kept=3200), Memory()
    scheduler.add(first)
    scheduler.add(second)
    starts: dict[int, int] = {}
    for _ in range(12):
        step = scheduler.schedule()
        memory.apply(scheduler.kv)
        for chunk in step.prefill:
            starts.setdefault(chunk.sequence.arrival, first.num_computed)
        for member in memory.run(step):
            member.append(3)
    assert starts[1] < first.num_prompt, "long before the first was done"
    assert second.num_cached == 360, "what is still missing of 400 is not worth another step"


def test_other_tenants_and_short_prefixes_are_not_waited_for() -> None:
    for members in (
        [prompt(300, 20, 0, "a"), prompt(300, 20, 1, "b")],
        [prompt(100, 20, 0, answer=200), prompt(100, 20, 1, answer=200)],
    ):
        scheduler = scheduler_of(20_000, 1000, 8, 4000, kept=3200)
        assert run_all(scheduler, members).computed == sum(member.num_prompt for member in members)
        assert not scheduler.prefixes.hit_tokens
    off = scheduler_of(20_000, 1000, 8, 4000)
    assert run_all(off, [prompt(300, 20, place) for place in range(2)]).computed == 640, "switched off"


def test_what_joined_a_step_that_failed_is_computed_again() -> None:
    scheduler, memory = scheduler_of(20_000, 1000, 8, 4000, kept=3200), Memory()
    members = [prompt(300, 20, place) for place in range(3)]
    for member in members:
        scheduler.add(member)
    step = scheduler.schedule()
    assert step.joined == members[1:]
    memory.apply(scheduler.kv)
    for member in step.joined:
        scheduler.preempt(member)
    assert run_all(scheduler, [], memory).computed == 320 + 2 * 20


def test_devices_are_spoken_to_in_one_file_alone() -> None:
    package = Path(qvl.__file__).parent
    named = re.compile(r"\btorch\.(cuda|npu|mps|xpu)\b|^\s*(import|from) torch_npu|\.(cuda|npu)\(\)", re.MULTILINE)
    speaking = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if named.search(path.read_text("utf-8"))
    }
    # ascend/ examines hosts, and must ask torch_npu itself.
    assert {path for path in speaking if not path.startswith("ascend/")} == {"backends/local/model/device.py"}


def test_the_accounting_imports_no_torch() -> None:
    code = (
        "import sys; import qvl.backends.local.scheduling.scheduler, qvl.backends.local.text.processor; "
        "import qvl.backends.local.backend; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
