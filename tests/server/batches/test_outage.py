"""A batch waits for a backend that is down; a line that fails by itself does not wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from qvl.backends.openai.backend import OpenAIBackend
from qvl.server.batches import ask_line
from tests.scripted_endpoint import ScriptedEndpoint, Status
from tests.server.batches.asking import begin, content, ended, jsonl, line
from tests.server.batches.test_batches_killed import connect as connect_to
from tests.server.batches.test_batches_killed import wait_for
from tests.server.conftest import Running
from tests.server.processes import Process

Connect = Callable[..., openai.OpenAI]


@pytest.fixture
def ahead(
    serve: Callable[..., Running], endpoint: ScriptedEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Running:
    """A server in front of an endpoint that the test stops and starts again."""
    monkeypatch.setattr(ask_line, "LONGEST_PAUSE", 0.2)
    backend = OpenAIBackend("echo", base_url=endpoint.url, probe=False, max_retries=0, health_interval=None)
    return serve(backend, cache=None, batch_dir=tmp_path / "batches", batch_concurrency=4)


def lines(count: int) -> bytes:
    return jsonl(*(line(f"line-{number}", f"say {number}", model="echo") for number in range(count)))


def test_an_outage_is_waited_for(
    ahead: Running, endpoint: ScriptedEndpoint, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(ahead)
    endpoint.stop()
    batch = begin(client, lines(12))
    failed = "qvl_backend_failures_total"
    # More tries than a line that fails by itself has.
    wait_for(lambda: ahead.metric(failed) > 4 * 3 * ask_line.TRIES)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    endpoint.start()
    batch = ended(client, batch)
    assert batch.request_counts.model_dump() == {"total": 12, "completed": 12, "failed": 0}
    assert len([one for one in caplog.messages if "batches wait for it" in one]) == 1


@pytest.mark.parametrize("status", [502, *(pytest.param(one, marks=pytest.mark.slow) for one in (429, 503, 504))])
def test_an_endpoint_that_answers_nobody_is_an_outage(
    ahead: Running, endpoint: ScriptedEndpoint, connect: Connect, status: int
) -> None:
    client = connect(ahead)
    endpoint.default, answering = Status(status), endpoint.default
    batch = begin(client, lines(2))
    wait_for(lambda: len(endpoint.chats) > 4 * 3 * ask_line.TRIES)
    endpoint.default = answering
    assert ended(client, batch).request_counts.completed == 2


def test_a_line_that_fails_by_itself_has_its_error(
    ahead: Running, endpoint: ScriptedEndpoint, connect: Connect
) -> None:
    class Picky:
        async def __call__(self, exchange: Any) -> None:
            if "poison" in str(exchange.received.body["messages"]):
                await exchange.whole(502, {"error": {"message": "the worker stumbled"}})
            else:
                await answering(exchange)

    client = connect(ahead)
    answering, endpoint.default = endpoint.default, Picky()
    batch = ended(client, begin(client, lines(3) + jsonl(line("bad", "poison", model="echo"))))
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 3, "failed": 1}
    assert content(client, batch.error_file_id)["bad"]["response"]["status_code"] in (502, 503)


def test_a_batch_that_waits_can_be_cancelled_and_expires(
    ahead: Running, endpoint: ScriptedEndpoint, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(ahead)
    endpoint.stop()
    first, second = begin(client, lines(3)), begin(client, lines(3))
    wait_for(lambda: ahead.metric("qvl_backend_failures_total") > 20)
    client.batches.cancel(first.id)
    assert ended(client, client.batches.retrieve(first.id)).status == "cancelled"
    store = ahead.core.batch_store
    assert store is not None
    monkeypatch.setattr(store, "now", lambda: int(time.time()) + 25 * 3600)
    batch = ended(client, second)
    assert (batch.status, batch.request_counts.failed) == ("expired", 3)
    errors = content(client, batch.error_file_id)
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}
    endpoint.start()


@pytest.mark.slow
def test_a_batch_goes_on_when_its_killed_engine_is_started_again(run: Callable[..., Process], tmp_path: Path) -> None:
    engine = run("--cache", "off").wait_ready()
    port = engine.address.rpartition(":")[2]
    front = run(
        "openai:bundled", "--base-url", f"{engine.address}/v1", "--batch-dir", str(tmp_path), "--cache", "off"
    ).wait_ready()
    with connect_to(front) as client:
        # So many that the engine is killed long before the last.
        requests = [line(f"line-{n}", f"What is {n}?", model="bundled", max_tokens=8) for n in range(400)]
        batch = begin(client, jsonl(*requests))
        wait_for(lambda: (client.batches.retrieve(batch.id).request_counts or batch).completed > 3)
        engine.popen.kill()
        engine.popen.wait(10)
        wait_for(lambda: any("batches wait for it" in one for one in front.lines))
        assert client.batches.retrieve(batch.id).status == "in_progress"
        run("--cache", "off", SERVER_PORT=port).wait_ready()
        batch = ended(client, batch, 400)
        assert batch.request_counts.model_dump() == {"total": 400, "completed": 400, "failed": 0}
        assert len(content(client, batch.output_file_id)) == 400
