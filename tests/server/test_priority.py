"""`priority`: of the requests that wait in the engine the one with the least comes first, whenever it came."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.server.conftest import Running, start

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend

ASKED = [{"role": "user", "content": "What brand is it?"}]


def waiting(running: Running) -> float:
    return running.core.pipeline.backend.stats().get("num_waiting", 0)


def test_priority_reorders_those_who_wait() -> None:
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20, max_num_seqs=1), cache="off")
    order: list[int] = []
    lock = threading.Lock()
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:

        def ask(priority: int) -> None:
            stream = client.chat.completions.create(
                model="bundled",
                messages=[{"role": "user", "content": f"What brand is it? ({priority})"}],
                max_tokens=4,
                stream=True,
                extra_body={"priority": priority},
            )
            for number, _ in enumerate(stream):
                if number == 1:
                    with lock:
                        order.append(priority)

        first = client.chat.completions.create(
            model="bundled", messages=ASKED, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        events = iter(first)
        next(events)
        with ThreadPoolExecutor(4) as pool:
            asked = []
            for number, priority in enumerate((3, -2, 7, 0), start=1):
                asked.append(pool.submit(ask, priority))
                end = time.monotonic() + 60
                while waiting(running) < number:
                    assert time.monotonic() < end, "the first request ended before the others had come"
                    time.sleep(0.002)
            first.close()
            for one in asked:
                one.result(60)
    running.stop()
    assert order == [-2, 0, 3, 7]
