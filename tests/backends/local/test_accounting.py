"""Scheduler, sequences, rows and prefixes hold their promises for any course of events; no torch is needed."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import qvl
from qvl.backends.local.scheduling.kv_cache import Copy, KvCache, LoadBlocks, Resize, Slot, capacities
from qvl.backends.local.scheduling.prefix_cache import BLOCK, BlockHashes, PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler, Step
from qvl.backends.local.scheduling.sequence import Sequence, SequenceStatus
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
    """Plays the runner: what each row and block really holds, so that a lost or mixed-up copy shows."""

    rows: dict[tuple[int, int], list[int | None]] = field(default_factory=dict)
    blocks: dict[int, list[int | None]] = field(default_factory=dict)

    def apply(self, kv: KvCache) -> None:
        for op in kv.take_ops():
            if isinstance(op, Resize):
                for key in [key for key in self.rows if key[0] == op.capacity and key[1] >= op.rows]:
                    del self.rows[key]
                for row in range(op.rows):
                    self.rows.setdefault((op.capacity, row), [None] * op.capacity)
            elif isinstance(op, Copy):
                self.rows[op.target][: op.tokens] = self.rows[op.source][: op.tokens]
            elif isinstance(op, LoadBlocks):
                held = [token for block in op.blocks for token in self.blocks[block]]
                self.rows[op.target][: len(held)] = held

    def run(self, step: Step) -> list[Sequence]:
        """Writes the KV of the step; every earlier position must hold this sequence's own token."""
        drafts = {chunk.sequence: chunk.draft for chunk in step.prefill}
        parts = [(s, len(s.tokens) - 1, len(s.tokens)) for s in step.decode]
        parts += [(chunk.sequence, chunk.start, chunk.end) for chunk in step.prefill]
        sampled = []
        for member, start, end in parts:
            assert member.slot is not None
            assert end <= member.slot.capacity
            row = self.rows[member.slot.capacity, member.slot.row]
            assert row[:start] == member.tokens[:start]
            row[start:end] = member.tokens[start:end]
            row[end : end + len(drafts.get(member, ()))] = drafts.get(member, ())
            member.num_computed = end
            if end == len(member.tokens):
                sampled.append(member)
        return sampled

    def save(self, prefixes: PrefixIndex, member: Sequence) -> None:
        hashes = member.hashes.extend(member.tokens[: member.num_computed])[: member.num_computed // BLOCK]
        for index, block in prefixes.insert(hashes):
            self.blocks[block] = member.tokens[index * BLOCK : (index + 1) * BLOCK]


requests = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=24)


@settings(max_examples=120, deadline=None)
@given(
    wanted=requests,
    budget=st.integers(384, 4000),
    seqs=st.integers(1, 8),
    batched=st.integers(9, 200),
    blocks=st.sampled_from([0, 3, 40]),
    guesses=st.sampled_from([0, 8, 32]),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_and_nothing_leaks_whatever_happens(
    wanted: list[tuple[int, int]], budget: int, seqs: int, batched: int, blocks: int, guesses: int, seed: int
) -> None:
    dice = random.Random(seed)
    kv = KvCache(budget, max_tokens=360, smallest=32)
    prefixes = PrefixIndex(blocks, step=4)
    scheduler = Scheduler(kv, prefixes, seqs, batched, draft_rows=guesses)
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
            assert aborted.slot is None
        step = scheduler.schedule()
        assert step.num_tokens <= batched
        assert len(scheduler.running) <= seqs
        assert kv.reserved <= kv.budget
        assert kv.num_slots == len(scheduler.running)
        held = [(s.slot.capacity, s.slot.row) for s in scheduler.running if s.slot is not None]
        assert len(set(held)) == len(held) == len(scheduler.running)
        assert step or not (scheduler.waiting or scheduler.running), "something waits and nothing runs"
        memory.apply(kv)
        for member in memory.run(step):
            memory.save(prefixes, member)
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=6), max_size=20), st.integers(1, 8))
def test_a_kept_prefix_is_the_longest_one_and_holds_its_own_tokens(chains: list[list[int]], size: int) -> None:
    index = PrefixIndex(size, step=2)
    content: dict[int, tuple[int, ...]] = {}
    for chain in chains:
        tokens = [word for word in chain for _ in range(BLOCK)]
        hashes = BlockHashes(()).extend(tokens)
        found = index.match(hashes, len(tokens))
        for place, block in enumerate(found):
            assert content[block] == tuple(chain[: place + 1])
        for place, block in index.insert(hashes):
            content[block] = tuple(chain[: place + 1])
        assert len(index) <= size
        assert index.match(hashes, len(tokens)) == tuple(block for block in index.match(hashes, len(tokens)))
        assert len(index.match(hashes, len(tokens))) == min(len(chain), size)


def test_another_picture_or_another_place_is_another_prefix() -> None:
    tokens = [5] * (3 * BLOCK)
    plain = BlockHashes(()).extend(tokens)
    seen = BlockHashes([PreparedPicture("a", (8, 8), 40, 16)]).extend(tokens)
    other = BlockHashes([PreparedPicture("b", (8, 8), 40, 16)]).extend(tokens)
    moved = BlockHashes([PreparedPicture("a", (8, 8), 41, 16)]).extend(tokens)
    assert plain[0] == seen[0] == other[0] == moved[0]
    assert len({plain[1], seen[1], other[1], moved[1]}) == 4
    assert len({plain[2], seen[2], other[2], moved[2]}) == 4


def test_a_long_prompt_does_not_stall_running_answers() -> None:
    scheduler = Scheduler(KvCache(60_000, 20_000), PrefixIndex(0), 4, 64)
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
    scheduler = Scheduler(KvCache(4096, 1024, smallest=32), PrefixIndex(0), 4, 16)
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
    scheduler = Scheduler(KvCache(10_000, 1000), PrefixIndex(0), 8, 64)
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
    assert scheduler.schedule().prefill[0].sequence is choice


def test_choices_of_one_request_share_one_prefill() -> None:
    scheduler = Scheduler(KvCache(10_000, 1000), PrefixIndex(0), 8, 256)
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


def prompt(common: int, own: int, arrival: int, salt: str = "") -> Sequence:
    """A prompt of `common` tokens that all begin with and `own` tokens that no other has."""
    tokens = [*range(common), *(1000 * (arrival + 1) + place for place in range(own))]
    prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, (), salt=salt)
    return Sequence(None, 0, prepared, SamplingParams(max_tokens=5), arrival, seed=0)


def prefilled(members: list[Sequence], blocks: int = 100, batched: int = 4000) -> tuple[int, Scheduler]:
    """Run all to their first token; return how many prompt tokens were computed."""
    scheduler, memory, computed = Scheduler(KvCache(20_000, 1000), PrefixIndex(blocks), 8, batched), Memory(), 0
    for member in members:
        scheduler.add(member)
    for _ in range(40):
        step = scheduler.schedule()
        memory.apply(scheduler.kv)
        computed += sum(chunk.count for chunk in step.prefill)
        for member in memory.run(step):
            memory.save(scheduler.prefixes, member)
            member.append(3)
            if member.remaining <= 0:
                scheduler.finish(member)
    assert all(member.num_output for member in members)
    return computed, scheduler


def test_prompts_that_arrive_together_compute_their_common_prefix_once() -> None:
    members = [prompt(300, 20, place) for place in range(6)]
    computed, scheduler = prefilled(members)
    assert computed == 320 + 5 * (320 - 288), "whole blocks are shared"
    assert [member.num_cached for member in members] == [0, *[288] * 5]
    assert scheduler.prefixes.hit_tokens == 5 * 288


def test_a_prompt_starts_as_soon_as_the_prefix_that_it_waits_for_is_there() -> None:
    """And not only when all of the other prompt is."""
    first, second = prompt(200, 700, 0), prompt(200, 20, 1)
    first.max_chunk = 60
    scheduler, memory = Scheduler(KvCache(20_000, 1000), PrefixIndex(100), 8, 100), Memory()
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
    assert second.num_cached == 120, "what is still missing of 192 is not worth another step"


def test_other_tenants_and_short_prefixes_are_not_waited_for() -> None:
    for members in ([prompt(300, 20, 0, "a"), prompt(300, 20, 1, "b")], [prompt(100, 20, 0), prompt(100, 20, 1)]):
        computed, scheduler = prefilled(members)
        assert computed == sum(member.num_prompt for member in members)
        assert not scheduler.prefixes.hit_tokens
    assert prefilled([prompt(300, 20, place) for place in range(2)], blocks=0)[0] == 640, "switched off"


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
