"""Requests for two kinds of logprobs never run in one step of vLLM, whatever their number and order."""

from __future__ import annotations

import asyncio
import random

import pytest

from qvl.backends.vllm.logprob_turns import Kind, LogprobTurns


@pytest.mark.parametrize("seed", range(6))
def test_one_kind_runs_at_a_time_and_nobody_is_forgotten(seed: int) -> None:
    dice, turns, running, done = random.Random(seed), LogprobTurns(), [], 0
    most = {"named": 0, "likeliest": 0}

    async def work(kind: Kind | None) -> None:
        nonlocal done
        await asyncio.sleep(dice.random() / 100)
        async with turns.turn(kind):
            if kind is not None:
                running.append(kind)
                assert len(set(running)) == 1
                most[kind] = max(most[kind], len(running))
            try:
                await asyncio.sleep(dice.random() / 100)
                done += 1
            finally:
                if kind is not None:
                    running.remove(kind)

    async def run() -> int:
        kinds: list[Kind | None] = [dice.choice(["named", "likeliest", None]) for _ in range(40)]
        tasks = [asyncio.create_task(work(kind)) for kind in kinds]
        await asyncio.sleep(0.008)
        gone = [task for task in tasks if not task.done() and dice.random() < 0.3]
        for task in gone:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        async with asyncio.timeout(5), turns.turn("named"):
            pass
        async with asyncio.timeout(5), turns.turn("likeliest"):
            pass
        return sum(task.cancelled() for task in tasks)

    assert asyncio.run(run()) + done == 40
    assert max(most.values()) > 1


def test_a_stream_of_one_kind_does_not_starve_the_other() -> None:
    async def run() -> list[str]:
        turns, order = LogprobTurns(), []

        async def work(name: str, kind: Kind) -> None:
            async with turns.turn(kind):
                order.append(name)
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(work(name, kind)) for name, kind in (("a", "likeliest"), ("b", "named"))]
        await asyncio.sleep(0.002)
        # It would fit with the one that runs, but another waits.
        tasks.append(asyncio.create_task(work("c", "likeliest")))
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]
