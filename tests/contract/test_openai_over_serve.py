"""The `openai` backend against a real `qvl-serve` with the bundled model keeps what every backend promises.

Over sockets, in the server's own thread: each capability is what the probe found out, none is assumed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai import fleet
from qvl.backends.openai.backend import OpenAIBackend
from qvl.testing import BackendContract, Sight
from qvl.types import SamplingParams
from tests.backends import bundled
from tests.server.conftest import Running, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    fleet.PROBED.clear()
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20), cache="off", wait=False)
    # Loading takes as long as the machine is busy, and until then the answer is 503.
    deadline = time.monotonic() + 120
    while running.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, "the model was never ready"
        time.sleep(0.05)
    yield running
    running.stop()


class TestOpenAIOverServe(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls, served: Running) -> Callable[[], Backend]:
        return lambda: OpenAIBackend(base_url=served.url)

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight:
        return bundled.sight()


def test_the_probe_finds_all_that_the_served_model_can_do(served: Running) -> None:
    """So that the contract above tests it all, instead of seeing it refused."""

    async def found() -> tuple[Backend, Backend]:
        async with OpenAIBackend(base_url=served.url) as backend:
            return backend.capabilities, served.backend.capabilities

    there, own = asyncio.run(found())
    assert there.sampling == own.sampling == SamplingParams.names()
    assert there.response_formats == own.response_formats - {"text"}
    assert (there.tools, there.images > 0, there.max_context) == (own.tools, True, own.max_context)


def test_an_answer_over_http_is_the_answer_in_process(served: Running) -> None:
    from qvl.testing.asking import ask

    async def both() -> tuple[str, str]:
        request = ask("Describe the product.", *bundled.sight().pictures.values(), max_tokens=40)
        async with OpenAIBackend(base_url=served.url) as backend:
            there = (await backend.generate(request)).text
        # Another loop than the server's, so another instance.
        async with LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20) as own:
            return there, (await own.generate(request)).text

    there, own = asyncio.run(both())
    assert there == own


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"grammar": "start: /a/", "regex": "a"}},
        {"structured_outputs": {"structural_tag": "x"}},
    ],
)
def test_what_structured_outputs_cannot_mean_is_refused_by_name(served: Running, fields: dict[str, Any]) -> None:
    said = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **fields})
    assert said.status_code == 400
    assert said.json()["error"]["param"].startswith("structured_outputs")
