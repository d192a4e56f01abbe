"""`/v1/batches` by OpenAI's own client, over a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch, FileObject

from qvl.types import ChatRequest, Chunk, Usage
from tests.server.batches.asking import CHAT, begin, content, ended, jsonl, line, upload
from tests.server.conftest import Running, data_url
from tests.server.echo_backend import EchoBackend
from tests.server.test_load import until
from tests.server.test_published_schema import fits


def test_a_batch_goes_from_upload_to_its_answers(client: openai.OpenAI, running: Running) -> None:
    picture = [{"type": "image_url", "image_url": {"url": data_url("red")}}, {"type": "text", "text": "which"}]
    lines = jsonl(line("a", "one two"), line("b", picture), line("c", max_tokens=-1), line("d", nonsense=True))
    begun = begin(client, lines, metadata={"night": "1"})
    assert begun.status in ("validating", "in_progress")
    batch = ended(client, begun)
    assert batch.status == "completed"
    assert batch.metadata == {"night": "1"}
    assert batch.model == "echo-vl"
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    answers, errors = content(client, batch.output_file_id), content(client, batch.error_file_id)
    said = {name: one["response"]["body"]["choices"][0]["message"]["content"] for name, one in answers.items()}
    assert said == {"a": "one two", "b": "red 64x64, which"}
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in answers.values())
    assert batch.usage.total_tokens == sum(one["response"]["body"]["usage"]["total_tokens"] for one in answers.values())
    assert errors["c"]["response"]["status_code"] == 400
    assert errors["c"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert errors["d"]["response"]["body"]["error"]["code"] == "unsupported_parameter"
    fits(Batch, running.get(f"/v1/batches/{batch.id}").json(), "Batch")
    fits(FileObject, running.get(f"/v1/files/{batch.output_file_id}").json(), "FileObject")
    facts = client.files.retrieve(batch.output_file_id)
    assert facts.purpose == "batch_output"
    assert facts.filename == f"{batch.id}_output.jsonl"
    assert running.metric("qvl_batch_requests_total") == 4
    assert running.metric("qvl_batches_ended_total") == 1


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/responses", {"model": "echo-vl", "input": "hello world"}),
        ("/v1/completions", {"model": "echo-vl", "prompt": "hello world"}),
        (
            "/v1/messages",
            {"model": "echo-vl", "max_tokens": 9, "messages": [{"role": "user", "content": "hello world"}]},
        ),
    ],
)
def test_every_route_that_asks_the_model_can_be_asked(client: openai.OpenAI, endpoint: str, body: Any) -> None:
    request = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    batch = ended(client, begin(client, jsonl(request), endpoint))
    assert batch.request_counts.completed == 1
    assert "hello world" in json.dumps(content(client, batch.output_file_id)["a"]["response"]["body"])
    assert batch.usage.output_tokens > 0


def test_the_tokens_of_a_batch_are_those_of_its_answers_in_every_form(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
) -> None:
    client = connect(serve(CachedThought(), batch_dir=tmp_path, cache=None))
    messages = [{"role": "user", "content": "x"}]
    bodies: dict[str, Any] = {
        CHAT: {"messages": messages},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": messages, "max_tokens": 9},
    }
    for url, body in bodies.items():
        ask = {"model": "echo-vl", "request_id": "mine", **body}
        batch = ended(client, begin(client, jsonl({"custom_id": "a", "method": "POST", "url": url, "body": ask}), url))
        used = batch.usage
        assert (used.input_tokens, used.output_tokens, used.total_tokens) == (7, 5, 12)
        assert (used.input_tokens_details.cached_tokens, used.output_tokens_details.reasoning_tokens) == (4, 2)
        assert content(client, batch.output_file_id)["a"]["response"]["request_id"] == "mine"


class CachedThought(EchoBackend):
    """Thinks, over a prompt of which a part was known."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(reasoning="let me see")
        yield Chunk(text="red", finish_reason="stop", usage=Usage(7, 5, cached_tokens=4, reasoning_tokens=2))


def test_batches_are_listed_in_pages(client: openai.OpenAI) -> None:
    begun = [begin(client, jsonl(line("a"))).id for _ in range(3)]
    assert [one.id for one in client.batches.list(limit=1)] == begun[::-1]
    assert client.batches.list(limit=2).has_more
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=0)
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_x")


def test_no_key_sees_what_another_has(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(batch_dir=tmp_path, api_keys=("one", "two"))
    one, two = connect(running, "one"), connect(running, "two")
    batch = ended(one, begin(one, jsonl(line("a"))))
    assert list(two.files.list()) == []
    assert list(two.batches.list()) == []
    for file_id in (batch.input_file_id, batch.output_file_id):
        for call in (two.files.retrieve, two.files.content, two.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
    for call in (two.batches.retrieve, two.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.NotFoundError) as missing:
        two.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert missing.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError):
        two.files.list(after=batch.input_file_id)
    with pytest.raises(openai.AuthenticationError):
        connect(running, "three").files.list()
    assert len(list(one.files.list())) == 2


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{broken\n", "invalid_json_line", None),
        (b"[1]\n", "invalid_json_line", None),
        (b"\xff\xfe{\x00\n", "invalid_json_line", None),
        (jsonl(line("a")), "duplicate_custom_id", "custom_id"),
        (jsonl(line("b", url="/v1/responses")), "mismatched_endpoint", "url"),
        (jsonl(line("b", url="/etc/passwd")), "mismatched_endpoint", "url"),
        (jsonl(line("b") | {"method": "GET"}), "invalid_method", "method"),
        (jsonl(line("b") | {"custom_id": None}), "missing_required_parameter", "custom_id"),
        (jsonl(line("b") | {"custom_id": 7}), "invalid_value", "custom_id"),
        (jsonl(line("b") | {"priority": 7}), "unsupported_parameter", "priority"),
        (jsonl(line("b", model=None)), "missing_required_parameter", "body.model"),
        (jsonl(line("b", model="gpt-7")), "model_not_found", "model"),
        (jsonl(line("b", stream=True)), "unsupported_value", "body.stream"),
    ],
)
def test_a_bad_line_fails_the_batch_and_is_named(
    client: openai.OpenAI, running: Running, bad: bytes, code: str, param: str | None
) -> None:
    batch = ended(client, begin(client, jsonl(line("a")) + b"\r\n" + bad))
    assert batch.status == "failed"
    assert batch.failed_at
    assert [(error.code, error.line, error.param) for error in batch.errors.data] == [(code, 3, param)]
    assert batch.output_file_id is batch.error_file_id is None
    # Nothing was asked: a client can mend the file and send it again.
    assert running.backend.requests == []


def test_marks_and_line_ends_of_other_systems_are_read(client: openai.OpenAI) -> None:
    lines = b"\xef\xbb\xbf" + jsonl(line("a"), line("b")).replace(b"\n", b"\r\n").rstrip(b"\r\n")
    batch = ended(client, begin(client, b"\xef\xbb\xbf\r\n" + lines[3:]))
    assert batch.request_counts.completed == 2
    assert ended(client, begin(client, lines)).request_counts.completed == 2


@pytest.mark.parametrize(
    ("sent", "code"),
    [(b"", "empty_file"), (b" \r\n\n", "empty_file"), (b"hello", "invalid_jsonl"), (b"\x89PNG\r\n", "invalid_jsonl")],
)
def test_a_file_without_requests_is_refused(client: openai.OpenAI, tmp_path: Path, sent: bytes, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, sent)
    assert caught.value.code == code
    assert [path for path in tmp_path.glob("batches/*/*") if path.is_file()] == []


def test_a_batch_is_cancelled(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(EchoBackend(pause=0.05), batch_dir=tmp_path, batch_concurrency=2)
    client = connect(running)
    batch = begin(client, jsonl(*(line(f"{number}", f"a b c {number}") for number in range(200))))
    while client.batches.retrieve(batch.id).request_counts.completed == 0:
        time.sleep(0.05)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    assert 0 < batch.request_counts.completed < 200
    assert len(content(client, batch.output_file_id)) == batch.request_counts.completed == running.backend.started
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    client.files.delete(batch.input_file_id)


def test_what_is_over_its_time_expires(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(EchoBackend(pause=0.05), batch_dir=tmp_path, batch_concurrency=2)
    client = connect(running)
    store = running.core.batch_store
    batch = begin(
        client, jsonl(*(line(f"{number}", f"a b c {number}") for number in range(50))), completion_window="1h"
    )
    assert batch.expires_at == batch.created_at + 3600
    while client.batches.retrieve(batch.id).request_counts.completed == 0:
        time.sleep(0.05)
    assert store is not None
    store._clock = lambda: time.time() + 3601
    batch = ended(client, batch)
    assert batch.status == "expired"
    answers, errors = content(client, batch.output_file_id), content(client, batch.error_file_id)
    assert answers.keys() | errors.keys() == {str(number) for number in range(50)}
    assert not answers.keys() & errors.keys()
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}
    assert batch.request_counts.completed + batch.request_counts.failed == 50
    # Its files go after 30 days, from the disk too.
    store._clock = lambda: time.time() + 40 * 24 * 3600
    assert list(client.files.list()) == []
    store.sweep()
    assert list(tmp_path.glob("files/*")) == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "99999d"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, None),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"priority": 1}, "priority"),
    ],
)
def test_wrong_batches_are_refused(client: openai.OpenAI, running: Running, change: Any, param: str | None) -> None:
    body = {"input_file_id": upload(client, jsonl(line("a"))), "endpoint": CHAT, "completion_window": "24h"} | change
    answer = running.post("/v1/batches", body)
    assert answer.status_code == 400
    assert param is None or answer.json()["error"]["param"] == param


class Held(EchoBackend):
    """Begins answers, and ends them while it is not held."""

    held = True

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().stream(request):
            while self.held:
                await asyncio.sleep(0.005)
            yield chunk


def test_who_asks_now_is_not_behind_a_batch(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    backend = Held()
    running = serve(backend, batch_dir=tmp_path, max_concurrent=4, max_queue=64, batch_concurrency=4, cache=None)
    client = connect(running)
    batch = begin(client, jsonl(*(line(f"{number}", f"a b c {number}") for number in range(1000))))
    with ThreadPoolExecutor(1) as pool:
        for number in range(5):
            until(lambda: backend.running == 4)
            before = len(backend.requests)
            now = [{"role": "user", "content": f"now {number}"}]
            asked = pool.submit(client.chat.completions.create, model="echo-vl", messages=now)
            until(lambda: running.core.admission.waiting == 1)
            backend.held = False
            asked.result()
            backend.held = True
            # At most one of the batch in each of the four places came first.
            came = [request.messages[-1].text for request in backend.requests[before:]]
            assert came.index(f"now {number}") <= 4
    backend.held = False
    client.batches.cancel(batch.id)
    assert ended(client, batch).status == "cancelled"


def test_failures_of_the_backend_are_tried_again(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(batch_dir=tmp_path, cache=None)
    client = connect(running)
    running.backend.not_ready = "busy with something else"
    batch = begin(client, jsonl(line("a"), line("b")))
    while running.backend.refused < 2:
        time.sleep(0.02)
    running.backend.not_ready = None
    assert ended(client, batch).request_counts.completed == 2


def test_a_key_that_is_withdrawn_stops_its_batch_and_a_returned_one_goes_on(
    serve: Callable[..., Running], tmp_path: Path, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    folder = tmp_path / "batches"
    running = serve(EchoBackend(pause=0.02), batch_dir=folder, api_keys=("zero",), api_key_file=str(keys), cache=None)
    client = connect(running, "two")
    batch = begin(client, jsonl(*(line(f"{number}", f"a b c {number}") for number in range(200))))
    while not running.backend.started:
        time.sleep(0.01)
    keys.write_text("one\n")
    running.core.keys.reload()
    while running.backend.running:
        time.sleep(0.01)
    before, looks = running.backend.started, []
    store = running.core.batch_store
    unfinished = store.unfinished
    monkeypatch.setattr(store, "unfinished", lambda: looks.append(1) or unfinished())
    # The second look begins when the first has started whatever it would.
    while len(looks) < 2:
        time.sleep(0.01)
    assert running.backend.started == before < 200
    keys.write_text("one\ntwo\n")
    running.core.keys.reload()
    assert ended(client, batch).request_counts.completed == 200


def test_servers_of_other_models_leave_a_batch_alone(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
) -> None:
    here = serve(batch_dir=tmp_path, cache=None)
    there = serve(EchoBackend("other"), batch_dir=tmp_path, cache=None)
    mine = ended(connect(here), begin(connect(here), jsonl(line("a"))))
    theirs = ended(connect(there), begin(connect(there), jsonl(line("a", model="other"))))
    assert mine.request_counts.completed == theirs.request_counts.completed == 1
    assert (here.backend.started, there.backend.started) == (1, 1)


def test_an_input_that_is_gone_fails_its_batch(client: openai.OpenAI, running: Running) -> None:
    store = running.core.batch_store
    assert store is not None
    file_id = upload(client, jsonl(line("a")))
    store.path(file_id).unlink()
    batch = ended(client, client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h"))
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "file_not_found"
