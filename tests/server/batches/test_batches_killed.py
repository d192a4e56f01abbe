"""Batches through the end of their process: kill -9, SIGTERM, and `qvl batch run` started again."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.scripted_endpoint import Echo, ScriptedEndpoint
from tests.server.processes import CHAT, Process, remote
from tests.server.test_workers import children, linux

CONCURRENCY = 8
PICTURES = Path(__file__).parents[3] / "examples" / "pictures"


def lines(count: int, *, model: str = "echo") -> bytes:
    found = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": model, "messages": [{"role": "user", "content": f"say {number}"}]},
        }
        for number in range(count)
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in found)


def asked(endpoint: ScriptedEndpoint) -> Counter[str]:
    """How often each line was asked."""
    return Counter(received.body["messages"][-1]["content"] for received in endpoint.chats)


def check(output: str, count: int) -> None:
    """Each line has one answer, its own."""
    answers = [json.loads(one) for one in output.splitlines()]
    said = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in answers}
    assert len(answers) == count
    assert said == {f"line-{number}": f"say {number}" for number in range(count)}


def connect(process: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.address}/v1", api_key="none", max_retries=0)


def wait_for(found: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def through_kills(
    endpoint: ScriptedEndpoint, run: Callable[..., Process], folder: Path, count: int, kills: int
) -> None:
    """A batch of `count` lines is complete after `kills` kills, and only what was under way was asked twice."""
    settings = ["--batch-dir", str(folder), "--batch-concurrency", str(CONCURRENCY), "--cache", "off"]
    server = run(*remote(endpoint), *settings).wait_ready()
    with connect(server) as client:
        sent = client.files.create(file=("in.jsonl", io.BytesIO(lines(count))), purpose="batch")
        batch = client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h")
    for number in range(1, kills + 1):
        wait_for(lambda reached=count * number // (kills + 1): len(endpoint.chats) > reached)
        server.popen.kill()
        server.popen.wait(10)
        server = run(*remote(endpoint), *settings).wait_ready()
    with connect(server) as client:
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        ended = client.batches.retrieve(batch.id)
        assert ended.request_counts is not None
        assert ended.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
        assert ended.error_file_id is None
        assert ended.usage is not None
        assert ended.usage.output_tokens >= count
        check(client.files.content(ended.output_file_id or "").text, count)
    times = asked(endpoint)
    assert len(times) == count
    assert sum(times.values()) <= count + kills * CONCURRENCY


@pytest.fixture
def slow() -> Any:
    with ScriptedEndpoint(default=Echo(pause=0.02)) as found:
        yield found


@pytest.mark.slow
def test_a_batch_goes_on_after_kill_9(slow: ScriptedEndpoint, run: Callable[..., Process], tmp_path: Path) -> None:
    through_kills(slow, run, tmp_path, 240, 2)


@pytest.mark.slow
def test_two_thousand_lines_through_kill_9(
    endpoint: ScriptedEndpoint, run: Callable[..., Process], tmp_path: Path
) -> None:
    through_kills(endpoint, run, tmp_path, 2000, 3)


@pytest.mark.slow
def test_a_drained_server_leaves_a_batch_for_the_next(
    slow: ScriptedEndpoint, run: Callable[..., Process], tmp_path: Path
) -> None:
    settings = ["--batch-dir", str(tmp_path), "--batch-concurrency", "4", "--cache", "off", "--drain-timeout", "5"]
    server = run(*remote(slow), *settings).wait_ready()
    with connect(server) as client:
        sent = client.files.create(file=("in.jsonl", io.BytesIO(lines(200))), purpose="batch")
        batch = client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h")
    wait_for(lambda: len(slow.chats) > 20)
    server.popen.terminate()
    assert server.ended(20) == 0
    before = asked(slow)
    assert len(before) < 200
    server = run(*remote(slow), *settings).wait_ready()
    with connect(server) as client:
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        check(client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text, 200)
    # What was under way was finished first: nothing was asked twice.
    assert set(asked(slow).values()) == {1}


@linux
@pytest.mark.slow
def test_a_batch_goes_on_when_every_worker_is_killed(
    slow: ScriptedEndpoint, run: Callable[..., Process], tmp_path: Path
) -> None:
    settings = ["--batch-dir", str(tmp_path), "--batch-concurrency", str(CONCURRENCY), "--cache", "off"]
    server = run(*remote(slow), *settings, "--workers", "2").wait_ready()
    wait_for(lambda: len(children(server)) == 2)
    with connect(server) as client:
        sent = client.files.create(file=("in.jsonl", io.BytesIO(lines(240))), purpose="batch")
        batch = client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h")
    wait_for(lambda: len(slow.chats) > 80)
    for pid in children(server):
        os.kill(pid, signal.SIGKILL)

    def completed() -> bool:
        try:
            with connect(server) as client:
                return client.batches.retrieve(batch.id).status == "completed"
        except openai.APIConnectionError:
            return False

    wait_for(completed)
    with connect(server) as client:
        check(client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text, 240)
    assert sum(asked(slow).values()) <= 240 + CONCURRENCY
    server.popen.terminate()
    server.ended(60)


@pytest.mark.slow
def test_the_bundled_model_reads_the_pictures_of_a_batch(run: Callable[..., Process], tmp_path: Path) -> None:
    server = run("--batch-dir", str(tmp_path)).wait_ready()
    with connect(server) as client:
        asked_now, requests = {}, []
        for path in sorted(PICTURES.glob("*.png"))[:4]:
            url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            picture = {"type": "image_url", "image_url": {"url": url}}
            question = [{"role": "user", "content": [picture, {"type": "text", "text": "What brand is it?"}]}]
            body = {"model": client.models.list().data[0].id, "messages": question}
            requests.append({"custom_id": path.name, "method": "POST", "url": CHAT, "body": body})
        sent = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, requests)).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
        output = client.files.content(client.batches.retrieve(batch.id).output_file_id or "").text
        for one in map(json.loads, output.splitlines()):
            asked_now[one["custom_id"]] = one["response"]["body"]["choices"][0]["message"]["content"]
        assert len(set(asked_now.values())) > 1
        for request in requests:
            now = client.chat.completions.create(**request["body"]).choices[0].message.content
            assert asked_now[request["custom_id"]] == now


@pytest.mark.slow
def test_paths_of_pictures_through_kill_9(tmp_path: Path) -> None:
    """The bundled model reads files of this machine for `qvl batch run`, each once."""
    paths = sorted(PICTURES.glob("*.png"))
    requests = []
    for number in range(24):
        path = paths[number % len(paths)]
        named = str(path) if number % 2 else path.as_uri()
        picture = {"type": "image_url", "image_url": {"url": named}}
        question = {"role": "user", "content": [picture, {"type": "text", "text": f"What brand is it? ({number})"}]}
        body = {"model": "bundled", "messages": [question], "max_tokens": 12}
        requests.append({"custom_id": f"{number}", "method": "POST", "url": CHAT, "body": body})
    requests[7]["body"]["messages"][0]["content"][0]["image_url"]["url"] = str(tmp_path / "not-there.png")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests))
    output = tmp_path / "in.output.jsonl"
    args = [sys.executable, "-m", "qvl.cli", "batch", "run", str(tmp_path / "in.jsonl"), "--cache", "off", "-j", "4"]
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") > 2)
        process.kill()
    before = output.read_text()
    assert before.count("\n") < 23
    last = subprocess.run(args, stderr=subprocess.PIPE, text=True)
    assert last.returncode == 1
    assert "23 answered" in last.stderr
    after = output.read_text()
    assert after.startswith(before[: before.rindex("\n") + 1])
    answers = [json.loads(one) for one in after.splitlines()]
    assert sorted(int(one["custom_id"]) for one in answers) == [n for n in range(24) if n != 7]
    assert len({one["response"]["body"]["choices"][0]["message"]["content"] for one in answers}) > 1
    (error,) = map(json.loads, (tmp_path / "in.output.errors.jsonl").read_text().splitlines())
    assert error["custom_id"] == "7"
    assert error["response"]["body"]["error"]["param"] == "messages[0].content[0].image_url"


def command(endpoint: ScriptedEndpoint, *args: str) -> list[str]:
    model = ["--model", "openai:echo", "--base-url", endpoint.url, "-O", "probe=false", "--cache", "off"]
    return [sys.executable, "-m", "qvl.cli", "batch", "run", *args, *model]


@pytest.mark.slow
def test_a_run_without_a_server_goes_on_after_kill_9(slow: ScriptedEndpoint, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(200))
    args = command(slow, str(tmp_path / "in.jsonl"), "-j", str(CONCURRENCY))
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(slow.chats) > 60)
        slow.default = Echo(pause=60)
        try:
            other = subprocess.run(args, stderr=subprocess.PIPE, text=True)
        finally:
            process.kill()
    assert other.returncode == 2
    assert "another run writes into" in other.stderr
    slow.default = Echo()
    # As a kill in the middle of a line leaves it.
    with (tmp_path / "in.output.jsonl").open("ab") as output:
        output.write(b'{"id":"batch_req_1","custom')
    last = subprocess.run(args, stderr=subprocess.PIPE, text=True)
    assert last.returncode == 0, last.stderr
    assert "200 answered" in last.stderr
    check((tmp_path / "in.output.jsonl").read_text(), 200)
    assert sum(asked(slow).values()) <= 200 + CONCURRENCY
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.output.jsonl"]
