"""What ends in time, and nothing else by that."""

from __future__ import annotations

import asyncio

import pytest

from qvl.server.deadline import Deadline


def soon() -> float:
    return asyncio.get_running_loop().time() + 0.02


def test_a_block_ends_at_its_deadline_also_in_a_task_that_survived_a_cancellation() -> None:
    async def work(survive: int) -> bool:
        for _ in range(survive):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(30)
        with Deadline(soon()) as bounded:
            await asyncio.sleep(30)
        return bounded.caught

    async def main() -> None:
        for survive in range(3):
            task = asyncio.create_task(work(survive))
            for _ in range(survive):
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.sleep(0)
            assert await task is True

    asyncio.run(asyncio.wait_for(main(), 20))


def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    async def work() -> None:
        with Deadline(soon() + 60):
            await asyncio.sleep(30)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 20))
