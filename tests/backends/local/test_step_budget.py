"""The time budget of steps keeps its bound and starves nobody, on made-up costs; no torch is needed."""

from __future__ import annotations

import asyncio
import random
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.scheduling.sequence import SequenceStatus
from qvl.backends.local.scheduling.step_budget import LONGEST, StepBudget
from qvl.backends.local.scheduling.step_costs import StepCosts, Work
from qvl.backends.local.step_times import StepTimes
from qvl.errors import ConfigError
from tests.backends.local.simulate_engine import Job, Machine, Simulation, former_policy

machines = st.builds(
    Machine,
    base=st.floats(0.01, 0.1),
    row=st.floats(0.0002, 0.005),
    prompt=st.floats(0.0002, 0.002),
    picture=st.floats(0.0002, 0.002),
)
jobs = st.builds(
    Job, prompt=st.integers(4, 400), picture=st.sampled_from([0.0, 40.0, 320.0, 1500.0]), answer=st.integers(1, 40)
)


def measured(machine: Machine, seqs: int = 32) -> StepCosts:
    """Return what a machine without noise teaches the cost model."""
    costs = StepCosts()
    for rows in range(1, seqs + 1):
        costs.observe(Work(rows), machine.decode(rows))
    costs.observe(Work(prompt=100), 100 * machine.prompt)
    costs.observe(Work(pictures=100), 100 * machine.picture)
    return costs


@settings(max_examples=15, deadline=None)
@given(machine=machines, load=st.lists(jobs, min_size=1, max_size=40), factor=st.floats(2.0, 8.0))
def test_no_answer_waits_longer_than_the_bound(machine: Machine, load: list[Job], factor: float) -> None:
    # Above all decode steps and the smallest piece of a prompt or a picture; below that no bound can be kept.
    piece = 16 * max(machine.prompt, machine.picture)
    bound = factor * machine.decode(32) + 2 * piece
    for goal in ("throughput", "latency"):
        simulation = Simulation(machine, StepBudget(measured(machine), goal, bound * 1e3))
        outcome = simulation.closed_loop(len(load), 1, lambda arrival: load[arrival])
        assert max(outcome.gaps, default=0.0) <= bound * 1.001
        assert max(took for _, took, _ in outcome.steps) <= bound * 1.001
        assert outcome.tokens == sum(job.answer for job in load)


@pytest.mark.parametrize(
    ("machine", "share"),
    [
        (Machine(), 0.97),
        (Machine(base=0.014, row=0.0015), 0.96),
        # So much prompt work to a decode step that no bound of 4 keeps all rows busy.
        (Machine(base=0.02, row=0.001), 0.92),
        (Machine(prompt=0.0004, picture=0.0003), 0.97),
    ],
)
def test_with_latency_as_the_goal_the_bound_is_in_decode_steps_and_costs_little(machine: Machine, share: float) -> None:
    outcome = Simulation(machine, StepBudget(measured(machine), "latency")).closed_loop(32, 3)
    assert max(outcome.gaps) <= LONGEST * machine.decode(32) * 1.02
    former = former_policy(machine, 32, 3, Job())
    assert max(former.gaps) > 1.5 * max(outcome.gaps), "the bound is one that was not kept before"
    assert outcome.rate >= share * former.rate


@pytest.mark.parametrize("machine", [Machine(), Machine(base=0.02, row=0.001), Machine(picture=0.002)])
def test_throughput_is_that_of_steps_without_a_budget(machine: Machine) -> None:
    for rounds, share in ((1, 0.95), (6, 0.98)):
        even = Simulation(machine, StepBudget(measured(machine))).closed_loop(32, rounds)
        former = former_policy(machine, 32, rounds, Job())
        assert even.tokens == former.tokens
        assert even.rate >= share * former.rate
        assert even.gap(0.95) <= 0.65 * former.gap(0.95)


def test_the_budget_is_no_larger_than_the_queue_needs() -> None:
    machine = Machine()
    simulation = Simulation(machine, StepBudget(measured(machine)))
    for arrival in range(16):
        simulation.add(Job(prompt=16, picture=0.0, answer=400), arrival)
    while len(simulation.outcome.first) < 16:
        simulation.step()
    simulation.add(Job(prompt=100, picture=100.0, answer=4), 16)
    one = []
    while 16 not in simulation.outcome.first:
        simulation.step()
        one.append(simulation.outcome.steps[-1][1])
    assert max(one) <= 2.1 * machine.decode(16), "one that waits makes steps little longer"
    for arrival in range(17, 25):
        simulation.add(Job(prompt=400, picture=400.0, answer=4), arrival)
    simulation.step()
    assert simulation.outcome.steps[-1][1] > 1.5 * max(one), "many make them longer"


def test_equal_requests_start_in_the_order_of_their_arrival() -> None:
    for goal in ("throughput", "latency"):
        simulation = Simulation(Machine(), StepBudget(StepCosts(), goal), slow_first=20.0)
        outcome = simulation.closed_loop(40, 2)
        times = [outcome.first[arrival] for arrival in range(40)]
        assert times == sorted(times)


def test_a_stream_of_short_prompts_does_not_keep_a_picture_waiting_nor_a_picture_them() -> None:
    machine = Machine()
    simulation = Simulation(machine, StepBudget(measured(machine), "latency"))
    for arrival in range(8):
        simulation.add(Job(prompt=60, picture=0.0, answer=20), arrival)
    large = simulation.add(Job(prompt=300, picture=4000.0, answer=4), 8)
    small = simulation.add(Job(prompt=300, picture=100.0, answer=4), 9)
    arrivals, firsts = 10, simulation.outcome.first
    while large.num_output == 0:
        for _ in simulation.step():
            simulation.add(Job(prompt=200, picture=0.0, answer=8), arrivals)
            arrivals += 1
        if small.num_output and not large.num_output:
            small_at = small.arrival in firsts
    assert small_at, "a small picture passes a large one"
    longest = max(firsts[arrival] for arrival in range(10, arrivals) if arrival in firsts)
    assert longest < firsts[8] / 2, "prompts pass the large picture too"
    alone = Simulation(machine, StepBudget(measured(machine), "latency"))
    alone.closed_loop(1, 1, lambda arrival: Job(prompt=300, picture=4000.0, answer=4))
    # Half of what decode leaves of a step is the picture's.
    assert firsts[8] < 2 * LONGEST / (LONGEST - 1) * alone.outcome.first[0] * 1.3


def test_a_bound_that_cannot_be_kept_stops_nobody() -> None:
    outcome = Simulation(Machine(), StepBudget(measured(Machine()), max_step_ms=1.0), seqs=4).closed_loop(9, 2)
    assert outcome.tokens == 18 * 64
    for step, _, _ in outcome.steps:
        assert sum(chunk.count for chunk in step.prefill) <= 16
        assert not (step.prefill and step.pictures)


@settings(max_examples=20, deadline=None)
@given(
    load=st.lists(jobs, min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    goal=st.sampled_from(["throughput", "latency"]),
)
def test_aborted_and_preempted_requests_leave_nothing_behind(load: list[Job], seed: int, goal: str) -> None:
    dice = random.Random(seed)
    simulation = Simulation(Machine(noise=0.5), StepBudget(StepCosts(), goal), seqs=6, tokens=64, kv=1, slow_first=30.0)
    scheduler = simulation.scheduler
    living, todo, arrival = [], list(load), 0
    for _ in range(20_000):
        if todo and dice.random() < 0.4:
            living.append(simulation.add(todo.pop(), arrival))
            arrival += 1
        if scheduler.running and dice.random() < 0.05:
            scheduler.preempt(dice.choice(scheduler.running))
        if living and dice.random() < 0.03:
            aborted = living.pop(dice.randrange(len(living)))
            scheduler.finish(aborted)
            for picture in aborted.prepared.pictures:
                picture.features = picture.encoding = None
        if not (todo or living):
            break
        for ended in simulation.step():
            living.remove(ended)
    assert not todo
    assert not living
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.kv.num_slots == 0


def test_one_picture_of_two_requests_is_encoded_for_the_first() -> None:
    simulation = Simulation(Machine(), StepBudget(measured(Machine())))
    first, second = simulation.add(Job(), 0), simulation.add(Job(), 1)
    second.prepared.pictures[0].key = first.prepared.pictures[0].key
    while first.status is SequenceStatus.WAITING:
        simulation.step()
    encoded = [part.sequence for step, _, _ in simulation.outcome.steps[:-1] for part in step.pictures]
    assert encoded == [first] * len(encoded) != []
    while second.status is SequenceStatus.WAITING:
        simulation.step()


def test_the_costs_are_those_of_the_machine_whatever_disturbs_the_measurements() -> None:
    machine = Machine(noise=0.2)
    simulation = Simulation(machine, StepBudget(StepCosts()), slow_first=50.0)
    simulation.closed_loop(32, 2)
    costs = simulation.scheduler.budget.costs
    assert costs.prompt == pytest.approx(1.1 * machine.prompt, rel=0.15)
    assert costs.pictures == pytest.approx(1.1 * machine.picture, rel=0.1)
    for rows in (1, 8, 20, 32):
        assert costs.decode(rows) == pytest.approx(1.1 * machine.decode(rows), rel=0.2)


def test_costs_are_learned_from_whole_steps_too() -> None:
    machine, costs, dice = Machine(), StepCosts(), random.Random(3)
    costs.observe(Work(prompt=200), 200 * machine.prompt * 10)
    for _ in range(200):
        work = Work(dice.randrange(1, 33), dice.choice([0, 30, 200]), dice.choice([0, 0, 150]))
        exact = machine.decode(work.rows) + work.prompt * machine.prompt + work.pictures * machine.picture
        costs.observe(work, exact)
    assert costs.prompt == pytest.approx(machine.prompt, rel=0.1)
    assert costs.pictures == pytest.approx(machine.picture, rel=0.1)
    for few, many in pairwise((1, 4, 16, 32)):
        assert costs.decode(few) == pytest.approx(machine.decode(few), rel=0.1)
        assert (costs.decode(few) or 0) < (costs.decode(many) or 0)
    parts = costs.parts(Work(16, 100, 100)).scaled_to(1.0)
    assert parts.total == pytest.approx(1.0)


def test_nothing_is_known_before_the_first_step() -> None:
    costs = StepCosts()
    assert (costs.decode(4), costs.prompt, costs.pictures) == (None, None, None)
    costs.observe(Work(4), 0.05)
    assert costs.decode(2) == costs.decode(4) == 0.05
    assert costs.decode(16) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"goal": "speed"}, {"max_step_ms": 0}, {"max_step_ms": float("nan")}])
def test_a_goal_that_is_none_is_refused_in_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))) as caught:
        LocalBackend(**wrong)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_time_of_a_step_is_split_by_what_it_did(asynchronous: bool) -> None:
    machine, costs = Machine(base=0.004, row=0.0001, prompt=1e-5, picture=1e-5), StepCosts()
    times = StepTimes(costs, asynchronous=asynchronous)
    for units, work in ((0.0, Work(4)), (300.0, Work()), (0.0, Work(prompt=200)), (300.0, Work(4, 200))) * 3:
        times.start()
        if units:
            time.sleep(units * machine.picture)
            times.pictures(units)
        time.sleep(machine.decode(work.rows) + work.prompt * machine.prompt)
        times.end(work, sampled=bool(work.rows))
    simulation = Simulation(machine, StepBudget(costs))
    stats = times.stats(simulation.scheduler)
    assert stats["step_seconds_total"] >= 3 * (2 * machine.decode(4) + 600 * machine.picture + 400 * machine.prompt)
    assert min(stats[f"step_{part}_seconds_total"] for part in ("decode", "prompt", "picture")) > 0
    # Of the last one; how much longer it took than it slept, a busy machine decides.
    assert machine.decode(4) <= stats["step_seconds"] < stats["step_seconds_total"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"goal": "latency"}, "goal latency"),
        ({"max_step_ms": 20.0}, "steps of 20 ms at most"),
        ({"goal": "latency", "max_step_ms": 0.5}, "goal latency, steps of 0.5 ms at most"),
    ],
)
def test_what_was_set_stands_in_the_line_of_a_ready_model(settings: dict[str, Any], said: str) -> None:
    assert StepBudget(StepCosts(), **settings).describe() == said
    backend = LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20, **settings)

    async def described() -> str:
        async with backend:
            return backend.describe()

    assert asyncio.run(described()).endswith(f"; {said}" if said else "beyond")
