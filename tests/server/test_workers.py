"""`qvl-serve --workers`: one port, several processes, limits and metrics in common."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as PrometheusCounter

from qvl.server.settings import ServerSettings
from qvl.server.worker_metrics import SupervisorMetrics, WorkerMetrics, families, merged, rendered
from qvl.server.workers import ServerWorker
from tests.caches.redis_server import RedisServer, find_server
from tests.scripted_endpoint import Echo, ScriptedEndpoint
from tests.server.conftest import question
from tests.server.processes import CHAT, Process, gone, launch, remote

LINE = {"custom_id": "one", "method": "POST", "url": CHAT, "body": {"model": "echo", **question("batched")}}
linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")


def value(text: str, series: str) -> float:
    """The sum of the samples of a series whose names begin so."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(series))


def children(process: Process) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children").read_text().split()
    ]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Process, ScriptedEndpoint]]:
    """Two workers in front of an endpoint."""
    with ScriptedEndpoint() as endpoint:
        process = launch(*remote(endpoint), "--cache", "off", "--workers", "2")
        try:
            process.wait_ready()
            until(lambda: len(children(process)) == 2)
            yield process, endpoint
        finally:
            process.popen.send_signal(signal.SIGTERM)
            process.ended(30)
            process.end()


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    """Starts `qvl-serve` processes that end with the test, and their workers with them."""
    started: list[Process] = []

    def make(*args: str, **env: str) -> Process:
        started.append(launch(*args, **env))
        return started[-1]

    yield make
    for process in started:
        process.popen.terminate()
    for process in started:
        process.ended(60)
        process.end()


def test_each_limit_is_divided_without_a_remainder() -> None:
    whole = ServerSettings(max_concurrent=7, max_queue=1, requests_per_minute=10, concurrent_per_key=None)
    parts = [
        ServerWorker(number, 3, True, Path(), None, 0, 0).divided(whole, shared=False)  # type: ignore[arg-type]
        for number in range(3)
    ]
    assert [part.max_concurrent for part in parts] == [3, 2, 2]
    assert [part.max_queue for part in parts] == [1, 0, 0]
    assert sum(part.requests_per_minute or 0 for part in parts) == 10
    assert {part.concurrent_per_key for part in parts} == {None}


def test_counters_are_summed_with_those_of_the_dead_and_gauges_of_the_living_alone(tmp_path: Path) -> None:
    def registry(answers: int, running: int, ready: int) -> CollectorRegistry:
        made = CollectorRegistry()
        PrometheusCounter("qvl_answers", "A.", ["code"], registry=made).labels("200").inc(answers)
        Gauge("qvl_running", "R.", registry=made).set(running)
        Gauge("qvl_ready", "R.", registry=made).set(ready)
        return made

    text = rendered(merged([families(registry(3, 2, 1)), families(registry(4, 5, 0))])).decode()
    assert value(text, "qvl_answers_total") == 7
    assert value(text, "qvl_running") == 7
    assert value(text, "qvl_ready") == 0

    own = WorkerMetrics(tmp_path, 0, registry(3, 2, 1))
    gone = json.dumps({"pid": 2**22 - 1, "families": list(families(registry(4, 5, 0)))})
    (tmp_path / f"worker-{2**22 - 1}.json").write_text(gone)
    before = asyncio.run(own.render()).decode()
    SupervisorMetrics(tmp_path).died(2**22 - 1)
    after = asyncio.run(own.render()).decode()
    for text in (before, after):
        assert value(text, "qvl_answers_total") == 7
        assert value(text, "qvl_running") == 2
        assert value(text, "qvl_ready") == 1
    assert value(after, "qvl_worker_deaths_total") == 1


@linux
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--replicas"),
        (["openai:echo", "--replicas", "2"], "--ray-address"),
        (["openai:echo", "--base-url", "http://127.0.0.1:1", "--max-concurrent", "1"], "--max-concurrent 2"),
        (["openai:echo", "--base-url", "http://127.0.0.1:1", "--cache", "memory:"], "previous_response_id"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(run, arguments: list[str], said: str) -> None:
    process = run(*arguments, "--workers", "2")
    assert process.ended(120) == 2
    assert said in process.lines[-1]
    assert not any("Traceback" in line for line in process.lines)


@linux
def test_a_failure_at_the_start_is_told_once(run, endpoint: ScriptedEndpoint) -> None:
    process = run("openai:other", "--base-url", endpoint.url, "--cache", "off", "--workers", "3")
    assert process.ended(60) == 2
    assert len([line for line in process.lines if "`other`" in line and not line.startswith("{")]) == 1


@linux
@pytest.mark.slow
def test_a_port_that_another_server_shares_among_its_workers_is_in_use(two, run) -> None:
    process, endpoint = two
    port = process.address.rsplit(":", 1)[1]
    other = run(*remote(endpoint), "--workers", "2", SERVER_PORT=port)
    assert other.ended(60) == 2
    assert "in use" in other.lines[-1]


@linux
@pytest.mark.slow
def test_metrics_are_the_sum_and_stay_it_when_a_worker_is_killed(two) -> None:
    process, _ = two
    before = value(process.get("/metrics").text, f'qvl_http_requests_total{{route="{CHAT}"')
    for number in range(20):
        assert process.post(question(f"sum {number}")).status_code == 200
    counted = f'qvl_http_requests_total{{route="{CHAT}"'
    text = process.get("/metrics").text
    assert value(text, counted) - before == 20
    assert value(text, "qvl_workers") == 2
    deaths = value(text, "qvl_worker_deaths_total")
    old = children(process)
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len(children(process)) == 2 and children(process) != old)
    for number in range(20):
        assert process.post(question(f"after {number}")).status_code == 200
    text = process.get("/metrics").text
    assert value(text, counted) - before == 40
    assert value(text, "qvl_worker_deaths_total") == deaths + 1


@linux
@pytest.mark.slow
def test_sighup_reaches_every_worker(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n")
    process = run(*remote(endpoint), "--cache", "off", "--workers", "2", "--api-key-file", str(keys)).wait_ready()
    until(lambda: len(children(process)) == 2)
    keys.write_text("second\n")
    # A worker that has just begun may read the file by itself.
    until(lambda: process.get("/health").status_code == 200)
    process.popen.send_signal(signal.SIGHUP)

    def statuses(key: str) -> set[int]:
        # Each on a connection of its own, so that they come to both.
        asked = [
            httpx.get(process.address + "/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            for _ in range(12)
        ]
        return {answer.status_code for answer in asked}

    until(lambda: statuses("second") == {200})
    assert statuses("first") == {401}


async def ask(address: str, body: dict, key: str = "", wait: float = 120) -> tuple[int, dict[str, str], str]:
    """(status, headers, body) of one request on a connection of its own, without a client's weight.

    Raises OSError if the connection breaks before the answer is whole.
    """
    host, port = address.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: q\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    head += f"Authorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    async with asyncio.timeout(wait):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(head.encode() + data)
            answer = await reader.read()
        finally:
            writer.close()
    first, _, rest = answer.decode().partition("\r\n\r\n")
    lines = first.splitlines()
    if not lines:
        raise ConnectionResetError("no answer")
    headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in lines[1:])}
    if len(rest.encode()) < int(headers.get("content-length", 0)):
        raise ConnectionResetError("half an answer")
    return int(lines[0].split()[1]), headers, rest


@linux
@pytest.mark.slow
def test_a_drain_reaches_every_worker_and_loses_no_answer(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=0.1)] * 16)
    process = run(*remote(endpoint), "--cache", "off", "--workers", "2").wait_ready()
    until(lambda: len(children(process)) == 2)

    async def load() -> list[tuple[int, dict[str, str], str]]:
        asked = [asyncio.create_task(ask(process.address, question(f"drain {i} " + "w " * 8))) for i in range(16)]
        while len(endpoint.chats) < 16:
            await asyncio.sleep(0.01)
        process.popen.send_signal(signal.SIGINT)
        return await asyncio.gather(*asked)

    assert {status for status, _, _ in asyncio.run(load())} == {200}
    assert process.ended(30) == 0


@linux
@pytest.mark.slow
def test_what_one_worker_keeps_every_worker_knows(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    """Responses, what clients carry for the server, files and batches; each request on a connection of its own."""
    cache = f"sqlite:///{tmp_path / 'answers.db'}"
    folder = ("--cache", cache, "--batch-dir", str(tmp_path / "batches"))
    process = run(*remote(endpoint), *folder, "--workers", "2", "--api-key", "k").wait_ready()
    until(lambda: len(children(process)) == 2)

    def call(method: str, path: str, **more: object) -> httpx.Response:
        headers = {"Authorization": "Bearer k"}
        # Times out late: writers of the store wait for each other.
        return httpx.request(method, process.address + path, headers=headers, timeout=60, trust_env=False, **more)

    def served_by() -> set[str]:
        return {call("GET", "/health").headers["x-request-id"].rpartition("-")[2][:16] for _ in range(24)}

    assert len(served_by()) == 2
    ask = {"model": "echo", "input": "the first"}
    first = call("POST", "/v1/responses", json=ask).json()["id"]
    for number in range(12):
        assert call("GET", f"/v1/responses/{first}").status_code == 200
        following = {**ask, "input": f"and {number}", "previous_response_id": first}
        assert call("POST", "/v1/responses", json=following).status_code == 200
    turns = [len(received.body["messages"]) for received in endpoint.chats]
    assert turns == [1] + [3] * 12
    form = {"files": {"file": ("in.jsonl", json.dumps(LINE) + "\n")}, "data": {"purpose": "batch"}}
    sent = call("POST", "/v1/files", **form).json()["id"]
    begun = {"input_file_id": sent, "endpoint": CHAT, "completion_window": "24h"}
    batch = call("POST", "/v1/batches", json=begun).json()["id"]
    until(lambda: call("GET", f"/v1/batches/{batch}").json()["status"] == "completed")
    output = call("GET", f"/v1/batches/{batch}").json()["output_file_id"]
    assert {call("GET", f"/v1/files/{output}/content").text.count("\n") for _ in range(12)} == {1}
    assert call("DELETE", f"/v1/responses/{first}").status_code == 200
    assert call("DELETE", f"/v1/files/{sent}").status_code == 200
    assert {call("GET", f"/v1/responses/{first}").status_code for _ in range(12)} == {404}
    assert {call("GET", f"/v1/files/{sent}").status_code for _ in range(12)} == {404}
    # A line is asked once, whichever worker took the batch.
    assert len(endpoint.chats) == 14


@linux
@pytest.mark.slow
@pytest.mark.skipif(find_server() is None, reason="no redis-server")
def test_in_redis_workers_and_servers_count_together(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    with closing(RedisServer(tmp_path)) as redis:
        limits = ("--requests-per-minute", "10", "--max-concurrent", "2", "--max-queue", "3")
        common = [*remote(endpoint), "--cache", redis.url, "--cache-mode", "off", "--api-key", "k"]
        process = run(*common, *limits, "--workers", "2").wait_ready()
        other = run(*common, "--requests-per-minute", "10").wait_ready()
        until(lambda: len(children(process)) == 2)

        async def load() -> list[tuple[int, dict[str, str], str]]:
            return await asyncio.gather(*(ask(process.address, question(f"r {i}"), "k") for i in range(24)))

        endpoint.say(*[Echo(pause=0.2)] * 10)
        answers = asyncio.run(load())
        codes = Counter(json.loads(text)["error"]["code"] for status, _, text in answers if status == 429)
        served = [status for status, _, _ in answers if status == 200]
        # Ten pass the rate, two of them run and three wait at a time, in both workers together.
        assert len(served) + codes["engine_overloaded"] in (10, 11)
        assert len(served) >= 5
        assert codes["engine_overloaded"] > 0
        assert codes["rate_limit_exceeded"] >= 13
        assert all(float(headers["retry-after"]) > 0 for status, headers, _ in answers if status == 429)
        status, _, text = asyncio.run(ask(other.address, question("elsewhere"), "k"))
        assert (status, json.loads(text)["error"]["code"]) == (429, "rate_limit_exceeded")
        # Without Redis each counts for itself, and says so once.
        redis.kill()
        assert asyncio.run(ask(other.address, question("alone"), "k"))[0] in (200, 429)
        until(lambda: any("limits are not shared" in line for line in other.events()))


@linux
@pytest.mark.slow
def test_1000_clients_at_two_workers_lose_nothing_and_429_is_honest(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=0.02)] * 1000)
    limits = ("--max-concurrent", "64", "--max-queue", "256")
    process = run(*remote(endpoint), "--cache", "off", "--workers", "2", *limits).wait_ready()
    until(lambda: len(children(process)) == 2)

    async def load() -> list[tuple[int, dict[str, str], str]]:
        return await asyncio.gather(*(ask(process.address, question(f"client {i}")) for i in range(1000)))

    answers = asyncio.run(load())
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) <= {200, 429}
    assert statuses[200] == len(endpoint.chats) >= 64 + 256
    for status, headers, text in answers:
        if status == 429:
            assert json.loads(text)["error"]["code"] == "engine_overloaded"
            assert float(headers["retry-after"]) > 0
    text = process.get("/metrics").text
    for status, count in statuses.items():
        assert value(text, f'qvl_http_requests_total{{route="{CHAT}",status="{status}"}}') == count
    assert value(text, "qvl_admission_rejections_total") == statuses[429]


@linux
@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_was_answering(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=0.02)] * 2000)
    process = run(*remote(endpoint), "--cache", "off", "--workers", "2").wait_ready()
    until(lambda: len(children(process)) == 2)
    broken = 0

    async def client(number: int) -> list[int]:
        nonlocal broken
        statuses = []
        for turn in range(20):
            try:
                statuses.append((await ask(process.address, question(f"kill {number} {turn}")))[0])
            except OSError:
                broken += 1
                statuses.append((await ask(process.address, question(f"again {number} {turn}")))[0])
        return statuses

    async def load() -> list[list[int]]:
        asked = [asyncio.create_task(client(number)) for number in range(32)]
        await asyncio.sleep(1)
        for _ in range(2):
            # One of two: the other goes on while a new one comes.
            await asyncio.to_thread(until, lambda: len(children(process)) == 2)
            os.kill(children(process)[0], signal.SIGKILL)
            await asyncio.sleep(1)
        return await asyncio.gather(*asked)

    answered = asyncio.run(load())
    assert [len(statuses) for statuses in answered] == [20] * 32
    assert {status for statuses in answered for status in statuses} == {200}
    # What the two that died held; everything else went on.
    assert broken <= 64
    until(lambda: len(children(process)) == 2)
    process.popen.send_signal(signal.SIGTERM)
    assert process.ended(60) == 0


@linux
@pytest.mark.slow
def test_workers_end_when_their_supervisor_is_killed(run, endpoint: ScriptedEndpoint) -> None:
    process = run(*remote(endpoint), "--cache", "off", "--workers", "2").wait_ready()
    until(lambda: len(children(process)) == 2)
    pids = children(process)
    process.popen.kill()
    process.ended(30)
    until(lambda: all(gone(pid) for pid in pids))
