"""`priority`: of the requests that wait in the engine the one with the least comes first, whenever it came."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.server.conftest import start

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend

if TYPE_CHECKING:
    from qvl.backends.local.engine_request import EngineRequest

ASKED = [{"role": "user", "content": "What brand is it?"}]


class Watched(LocalBackend):
    """One answer at a time; keeps the engine's own records, which say when each began: clients race for their news."""

    def __init__(self) -> None:
        super().__init__(device="cpu", dtype="float32", kv_cache_bytes=64 << 20, max_num_seqs=1)
        self.made: list[EngineRequest] = []

    def _engine_request(self, *args: Any) -> EngineRequest:
        self.made.append(super()._engine_request(*args))
        return self.made[-1]

    def queued(self) -> int:
        """How many wait in the scheduler; `stats` counts those too that are still being prepared."""
        assert self._loaded is not None
        return len(self._loaded.engine.scheduler.waiting)


def test_priority_reorders_those_who_wait() -> None:
    backend = Watched()
    running = start(backend, cache="off")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

        def ask(priority: int) -> None:
            client.chat.completions.create(
                model="bundled",
                messages=[{"role": "user", "content": f"What brand is it? ({priority})"}],
                max_tokens=4,
                extra_body={"priority": priority},
            )

        # Longer than the others take to come, on any machine: it is closed as soon as they have.
        first = client.chat.completions.create(
            model="bundled", messages=ASKED, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(first))
        with ThreadPoolExecutor(4) as pool:
            asked = []
            for number, priority in enumerate((3, -2, 7, 0), start=1):
                asked.append(pool.submit(ask, priority))
                end = time.monotonic() + 60
                while backend.queued() < number:
                    assert time.monotonic() < end, "the first request ended before the others had come"
                    time.sleep(0.002)
            first.close()
            for one in asked:
                one.result(60)
    running.stop()
    begun = sorted(backend.made, key=lambda request: request.scheduled)
    assert [request.sequences[0].priority for request in begun] == [0, -2, 0, 3, 7]
