"""Simulates qvl's pool in front of 8, 64 and 512 engines: affinity, hits of the engines' picture caches, fail-over.

    python benchmarks/simulate_fleet.py --measure FILE [--model MODEL]
    python benchmarks/simulate_fleet.py --times FILE [--engines 8 64 512]

The pool is the real one (`qvl.backends.openai.pool`), on a clock that is moved; the engines are queues with service
times. `--measure` writes them, as this model has them on this device: `encode`, `prefill` and `decode`, in seconds for
a request, of its picture, of its text, of its answer; and `slope`: engines batch, and one that answers n requests takes
1 + (n - 1) * slope times as long for each. With the same times the same figures follow, but for the last column.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qvl.backends.openai.failures import down
from qvl.backends.openai.pool import EndpointPool, Member, Ticket

# Pictures for each engine, of which the popular ones are asked about most (Zipf).
PICTURES = 400
SKEW = 0.8
# Of those an engine keeps the features.
KEPT = 64
REQUESTS = 300
LOAD = 0.7
SLOTS = 8
DEAD_SHARE = 0.06
DEAD_SECONDS = 60.0


@dataclass
class Engine:
    """One engine: what it answers, the pictures that it keeps, and how often it was started."""

    name: str
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    running: int = 0
    life: int = 0
    alive: bool = True


@dataclass
class Report:
    """What one run gave."""

    hits: int = 0
    asked: int = 0
    repeated: int = 0
    lost: int = 0
    times: list[float] = field(default_factory=list)
    busiest: int = 0
    choosing: float = 0.0


def measured(model: str | None) -> dict[str, float]:
    """Service times of a model on this device: medians of eight pictures, alone and eight at once."""
    from qvl import Pipeline
    from qvl.tiny.render import main as render

    with tempfile.TemporaryDirectory() as folder, Pipeline(model, cache="off") as pipe:
        render([folder, "--n", str(SLOTS + 1), "--seed", "3"])
        pictures = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg", ".webp"))

        def timed(question: str, tokens: int) -> float:
            seconds = []
            for picture in pictures:
                began = time.perf_counter()
                pipe.ask(picture, question, max_tokens=tokens)
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds)

        # The first answer of a process is slower than any other.
        pipe.ask(pictures[0], "Is it red?", max_tokens=24)
        pictures = pictures[1:]
        new, known = timed("What is it?", 1), timed("Which colour is it?", 1)
        answer = timed("Describe it.", 24)
        together = []
        for turn in range(3):
            with ThreadPoolExecutor(SLOTS) as pool:
                began = time.perf_counter()
                questions = [f"Describe it. {turn} {number}" for number in range(SLOTS)]
                list(pool.map(partial(pipe.ask, max_tokens=24), pictures, questions))
                together.append(time.perf_counter() - began)
    slope = (statistics.median(together) / answer - 1) / (SLOTS - 1)
    times = {"encode": new - known, "prefill": known, "decode": answer - known, "slope": slope}
    return {name: round(max(0.0, seconds), 4) for name, seconds in times.items()}


async def simulate(count: int, policy: str, times: dict[str, float], seed: int = 1) -> Report:
    """Run one fleet; return the report."""
    rng = random.Random(seed)
    now = 0.0
    pool: EndpointPool[Engine] = EndpointPool(
        (Member(f"e{number}", Engine(f"e{number}")) for number in range(count)),
        policy=policy,  # type: ignore[arg-type]
        clock=lambda: now,
        rng=rng,
    )
    slope = times["slope"]
    alone = times["prefill"] + times["decode"]
    rate = LOAD * count * SLOTS / ((alone + times["encode"]) * (1 + (SLOTS - 1) * slope))
    weights = list(itertools.accumulate((place + 1) ** -SKEW for place in range(PICTURES * count)))
    report = Report()
    order = itertools.count()
    # (time, number, what, arguments)
    events: list[tuple[float, int, str, tuple]] = []
    at = 0.0
    for _ in range(REQUESTS * count):
        at += rng.expovariate(rate)
        picture = rng.choices(range(len(weights)), cum_weights=weights)[0]
        heapq.heappush(events, (at, next(order), "arrive", (at, picture, frozenset())))
    victims = rng.sample(pool.members, max(1, round(DEAD_SHARE * count)))
    heapq.heappush(events, (at / 2, next(order), "die", (victims,)))
    heapq.heappush(events, (at / 2 + DEAD_SECONDS, next(order), "rise", (victims,)))

    while events:
        now, _, what, given = heapq.heappop(events)
        if what == "die":
            for member in given[0]:
                member.target.alive, member.target.life = False, member.target.life + 1
                member.target.kept.clear()
                member.target.running = 0
        elif what == "rise":
            for member in given[0]:
                member.target.alive = True
        elif what == "arrive":
            began, picture, exclude = given
            choosing = time.perf_counter()
            ticket = await pool.acquire(cost=100, key=f"sha256:{picture:064x}", exclude=exclude, until=now + 1e9)
            report.choosing += time.perf_counter() - choosing
            report.asked += 1
            if ticket is None:
                heapq.heappush(events, (now + 0.5, next(order), "arrive", (began, picture, frozenset())))
                continue
            engine = ticket.member.target
            if not engine.alive:
                _failed(ticket)
                report.repeated += 1
                again = (began, picture, exclude | {engine.name})
                heapq.heappush(events, (now + 0.001, next(order), "arrive", again))
                continue
            hit = picture in engine.kept
            report.hits += hit
            engine.kept[picture] = None
            engine.kept.move_to_end(picture)
            if len(engine.kept) > KEPT:
                engine.kept.popitem(last=False)
            engine.running += 1
            report.busiest = max(report.busiest, engine.running)
            length = (alone + (0.0 if hit else times["encode"])) * (1 + (engine.running - 1) * slope)
            length *= rng.uniform(0.8, 1.2)
            heapq.heappush(events, (now + length, next(order), "end", (ticket, engine.life, began, picture)))
        else:
            ticket, life, began, picture = given
            engine = ticket.member.target
            if life != engine.life:
                # It died meanwhile; the connection broke then.
                _failed(ticket)
                report.repeated += 1
                heapq.heappush(events, (now, next(order), "arrive", (began, picture, frozenset({engine.name}))))
                continue
            engine.running -= 1
            ticket.first_token()
            ticket.release()
            report.times.append(now - began)
    report.lost = REQUESTS * count - len(report.times)
    return report


def _failed(ticket: Ticket[Engine]) -> None:
    ticket.failed(down("the connection was refused", ticket.member.name))
    ticket.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="*", default=[8, 64, 512])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--times", type=Path, help="what --measure wrote")
    what.add_argument("--measure", type=Path, help="measure, and write it here")
    parser.add_argument("--model", help="whose times are measured; the bundled one by default")
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.measure.write_text(json.dumps(measured(arguments.model), indent=1) + "\n")
        return
    times = json.loads(arguments.times.read_text())
    print(f"service times of one request, in seconds: {times}; {SLOTS} at a time at a load of {LOAD:.0%}")
    print("| engines | policy | picture hits | p50 s | p99 s | most at one engine | repeated | lost | us a choice |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count in arguments.engines:
        for policy in ("round_robin", "least_outstanding", "affinity"):
            report = asyncio.run(simulate(count, policy, times))
            rank = statistics.quantiles(report.times, n=100)
            answered = len(report.times)
            figures = f"{report.hits / max(1, report.asked):.0%} | {rank[49]:.2f} | {rank[98]:.2f} | {report.busiest}"
            rest = f"{report.repeated} | {report.lost} of {answered + report.lost}"
            each = report.choosing / report.asked * 1e6
            print(f"| {count} | {policy} | {figures} | {rest} | {each:.0f} |", flush=True)


if __name__ == "__main__":
    main()
