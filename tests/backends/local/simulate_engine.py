"""The engine's loop without tensors: the real scheduler and cost model, and a clock that made-up costs move on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qvl.backends.local.scheduling.kv_cache import KvCache
from qvl.backends.local.scheduling.prefix_cache import PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.scheduling.step import Step
from qvl.backends.local.scheduling.step_budget import StepBudget
from qvl.backends.local.scheduling.step_costs import Work
from qvl.backends.local.text.processor import PreparedPicture, PreparedRequest
from qvl.types import SamplingParams


@dataclass(frozen=True)
class Machine:
    """Seconds of a decode step (`base`, and `row` each), of a prompt's token and of a picture's unit."""

    base: float = 0.025
    row: float = 0.0028
    prompt: float = 0.0008
    picture: float = 0.0009
    noise: float = 0.0

    def decode(self, rows: int) -> float:
        return self.base + self.row * rows if rows else 0.0


@dataclass
class Job:
    """A request: prompt tokens, units of its picture (0: none), tokens of the answer."""

    prompt: int = 215
    picture: float = 320.0
    answer: int = 64


@dataclass
class Outcome:
    seconds: float = 0.0
    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    steps: list[tuple[Step, float, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def gap(self, share: float) -> float:
        ordered = sorted(self.gaps)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def sequence_of(job: Job, arrival: int) -> Sequence:
    tokens = [(7 * arrival + place) % 1000 for place in range(job.prompt)]
    pictures = ()
    if job.picture:
        pictures = (PreparedPicture(str(arrival), (2, 2), 3, 1, cost=job.picture),)
    prepared = PreparedRequest(tokens, np.zeros((3, job.prompt), dtype=np.int64), 0, pictures)
    return Sequence(None, 0, prepared, SamplingParams(max_tokens=job.answer), arrival, seed=arrival)


class Simulation:
    """Runs jobs; each of `clients` sends its next when its last one is done.

    Args:
        tokens: max_num_batched_tokens.
    """

    def __init__(
        self,
        machine: Machine,
        budget: StepBudget,
        *,
        seqs: int = 32,
        tokens: int = 512,
        kv: int = 1 << 20,
        slow_first: float = 1.0,
    ) -> None:
        self.machine = machine
        rows = KvCache(kv, 8192)
        self.scheduler = Scheduler(rows, PrefixIndex(rows, 0), seqs, tokens, budget)
        self.outcome = Outcome()
        self.now = 0.0
        self.last: dict[int, float] = {}
        self.began: dict[int, float] = {}
        self._dice = random.Random(1)
        self._slow = slow_first

    def add(self, job: Job, arrival: int) -> Sequence:
        sequence = sequence_of(job, arrival)
        self.began[arrival] = self.now
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Run one step and return the sequences that ended with it."""
        step = self.scheduler.schedule()
        assert step or not (self.scheduler.waiting or self.scheduler.running)
        self.scheduler.kv.take_ops()
        units = self._encode(step)
        work = self.scheduler.work(step)
        took = self._seconds(units * self.machine.picture)
        costs = self.scheduler.budget.costs
        if units:
            costs.observe(Work(pictures=units), took)
        forward = self._seconds(self.machine.decode(work.rows) + work.prompt * self.machine.prompt)
        costs.observe(work, forward)
        self.now += took + forward
        self.outcome.steps.append((step, took + forward, self.scheduler.budget.seconds))
        return self._tokens(step)

    def _seconds(self, exact: float) -> float:
        slow, self._slow = (self._slow, 1.0) if exact else (1.0, self._slow)
        return exact * slow * (1 + self.machine.noise * self._dice.random())

    def _encode(self, step: Step) -> float:
        """Encode whole pieces of a grain, as the tower does."""
        spent = 0.0
        for part in step.pictures:
            (picture,) = part.sequence.prepared.pictures
            done = 0.0
            while picture.features is None:
                piece = min(float(self.scheduler.grain), picture.cost - picture.encoded)
                if done and done + piece > part.units + 1e-9:
                    break
                done += piece
                picture.encoded += piece
                picture.encoding = iter(())
                if picture.encoded >= picture.cost - 1e-9:
                    picture.features, picture.encoding = object(), None  # type: ignore[assignment]
            spent += done
        return spent

    def _tokens(self, step: Step) -> list[Sequence]:
        ended = []
        sampling = [(sequence, len(sequence.tokens)) for sequence in step.decode]
        sampling += [(chunk.sequence, chunk.end) for chunk in step.prefill]
        for sequence, end in sampling:
            sequence.num_computed = end
            if end < len(sequence.tokens):
                continue
            sequence.append(0)
            self.outcome.tokens += 1
            arrival = sequence.arrival
            if arrival in self.last:
                self.outcome.gaps.append(self.now - self.last[arrival])
            else:
                self.outcome.first[arrival] = self.now - self.began[arrival]
            self.last[arrival] = self.now
            if sequence.remaining <= 0:
                self.scheduler.finish(sequence)
                ended.append(sequence)
        return ended

    def closed_loop(self, clients: int, rounds: int, job: Callable[[int], Job] = lambda arrival: Job()) -> Outcome:
        arrivals = 0
        for _ in range(clients):
            self.add(job(arrivals), arrivals)
            arrivals += 1
        while self.scheduler.waiting or self.scheduler.running:
            for _ in self.step():
                if arrivals < clients * rounds:
                    self.add(job(arrivals), arrivals)
                    arrivals += 1
        self.outcome.seconds = self.now
        return self.outcome


def former_policy(machine: Machine, clients: int, rounds: int, job: Job, tokens: int = 512) -> Outcome:
    """Steps bounded in prompt tokens alone, the pictures of their prompts encoded whole: the rate to compare with."""
    outcome = Outcome()
    waiting = [[job.prompt, job.answer, 0.0, float("nan")] for _ in range(clients)]
    running: list[list[float]] = []
    to_come = clients * (rounds - 1)
    now = 0.0
    while waiting or running:
        decode = [member for member in running if member[0] == 0]
        room, took = tokens - len(decode), machine.decode(len(decode))
        sampled = list(decode)
        for member in [*(m for m in running if m[0]), *list(waiting)]:
            if room <= 0 or (member in waiting and len(running) >= 32):
                break
            if member in waiting:
                waiting.remove(member)
                running.append(member)
                took += job.picture * machine.picture
            count = min(room, member[0])
            room -= int(count)
            took += count * machine.prompt
            member[0] -= count
            if not member[0]:
                sampled.append(member)
        now += took
        for member in sampled:
            if member[3] == member[3]:
                outcome.gaps.append(now - member[3])
            member[3] = now
            member[1] -= 1
            outcome.tokens += 1
            if not member[1]:
                running.remove(member)
                if to_come:
                    to_come -= 1
                    waiting.append([job.prompt, job.answer, 0.0, float("nan")])
    outcome.seconds = now
    return outcome
