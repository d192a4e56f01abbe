"""`/v1/files` and `/v1/batches` by OpenAI's own client, over a real server."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch, FileObject

from tests.server.conftest import Running, data_url
from tests.server.echo_backend import EchoBackend
from tests.server.test_published_schema import fits

CHAT = "/v1/chat/completions"


def line(custom_id: str, text: str = "hello world", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": "echo-vl", "messages": [{"role": "user", "content": text}]} | fields
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, io.BytesIO(content)), purpose="batch").id


def begin(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **options: Any) -> Any:
    options = {"completion_window": "24h"} | options
    return client.batches.create(input_file_id=upload(client, content), endpoint=endpoint, **options)


def ended(client: openai.OpenAI, batch: Any, seconds: float = 60) -> Any:
    """The batch, once it has its last state."""
    end = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def content(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of an output file by custom_id; each is there once."""
    assert file_id is not None
    lines = [json.loads(one) for one in client.files.content(file_id).text.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture
def running(serve: Callable[..., Running], tmp_path: Path) -> Running:
    return serve(batch_dir=tmp_path / "batches", cache=None)


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    """Makes clients that are closed with the test."""
    made: list[openai.OpenAI] = []

    def make(running: Running, key: str = "none") -> openai.OpenAI:
        made.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def client(running: Running, connect: Callable[..., openai.OpenAI]) -> openai.OpenAI:
    return connect(running)


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


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    sent = [upload(client, jsonl(line(str(number))), f"{number}.jsonl") for number in range(3)]
    assert [one.id for one in client.files.list(order="asc")] == sent
    # The client asks for page after page.
    assert [one.id for one in client.files.list(limit=1)] == sent[::-1]
    assert client.files.list(purpose="batch_output").data == []
    assert client.files.retrieve(sent[1]).filename == "1.jsonl"
    assert client.files.content(sent[1]).content == jsonl(line("1"))
    assert client.files.delete(sent[1]).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            gone(sent[1])
        assert caught.value.code == "file_not_found"


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
    with pytest.raises(openai.NotFoundError):
        two.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
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


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/abs/x.jsonl", "x.jsonl"),
        ("..", "upload"),
        ("a\x1b[31mb", "a[31mb"),
        ("x" * 300, "x" * 255),
    ],
)
def test_a_file_name_is_never_a_path(client: openai.OpenAI, tmp_path: Path, sent: str, kept: str) -> None:
    found = client.files.retrieve(upload(client, jsonl(line("a")), sent))
    assert found.filename == kept
    assert [path.name for path in tmp_path.glob("batches/files/*")] == [found.id]


@pytest.mark.parametrize("file_id", ["../batches.sqlite", "..%2fbatches.sqlite", "a/content", "'; DROP TABLE files"])
def test_an_id_is_never_a_path(client: openai.OpenAI, running: Running, file_id: str) -> None:
    upload(client, jsonl(line("a")))
    assert running.get(f"/v1/files/{file_id}/content").status_code == 404
    assert len(list(client.files.list())) == 1


def test_forms_that_are_wrong_are_refused(running: Running) -> None:
    good = {"file": ("in.jsonl", jsonl(line("a")))}
    with running.client() as client:

        def refused(status: int, word: str, **request: Any) -> None:
            answer = client.post("/v1/files", **request)
            assert answer.status_code == status, answer.text
            assert word in answer.json()["error"]["message"]

        refused(400, "purpose is missing", files=good)
        refused(400, "fine-tune", files=good, data={"purpose": "fine-tune"})
        refused(400, "file is missing", files={"other": (None, "x")}, data={"purpose": "batch"})
        refused(400, "unknown field", files=good, data={"purpose": "batch", "extra": "1"})
        refused(400, "there twice", files=[("file", good["file"])] * 2, data={"purpose": "batch"})
        refused(400, "expires_after", files=good, data={"purpose": "batch", "expires_after[seconds]": "5"})
        refused(400, "longer than", files=good, data={"purpose": "b" * 2000})
        refused(415, "multipart", json={"file": "x"})
        form = {"content-type": "multipart/form-data; boundary=x"}
        refused(400, "form", content=b"--y\r\n", headers=form)
        refused(400, "in the middle", content=b'--x\r\nContent-Disposition: form-data; name="file"', headers=form)
        refused(403, "other sites", files=good, data={"purpose": "batch"}, headers={"origin": "http://evil.example"})
        own = {"origin": running.url}
        assert client.post("/v1/files", files=good, data={"purpose": "batch"}, headers=own).status_code == 200


def test_sizes_are_bounded(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    lines = jsonl(*(line(f"{number}") for number in range(100)))
    running = serve(batch_dir=tmp_path, max_batch_file_bytes=len(lines), batch_disk_bytes=2 * len(lines))
    client = connect(running)
    with pytest.raises(openai.APIStatusError, match=f"larger than {len(lines)} bytes") as caught:
        upload(client, lines + b"{}")
    assert caught.value.status_code == 413
    upload(client, lines)
    upload(client, lines)
    with pytest.raises(openai.RateLimitError) as full:
        upload(client, jsonl(line("a")))
    assert full.value.code == "storage_full"
    client.files.delete(next(iter(client.files.list())).id)
    upload(client, jsonl(line("a")))


def test_one_key_does_not_take_all_the_space(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    lines = jsonl(*(line(f"{number}") for number in range(100)))
    running = serve(batch_dir=tmp_path, batch_disk_bytes=3 * len(lines), api_keys=("one", "two"))
    upload(connect(running, "one"), lines)
    with pytest.raises(openai.RateLimitError):
        upload(connect(running, "one"), lines)
    upload(connect(running, "two"), lines)


def test_a_line_without_an_end_is_refused_before_it_is_there(serve: Callable[..., Running], tmp_path: Path) -> None:
    running = serve(batch_dir=tmp_path, max_body_bytes=300_000)
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 100000000\r\n\r\n"
    )
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"'
    with socket.create_connection(("127.0.0.1", running.port), 30) as connection:
        # The rest of the 100 MB is never sent.
        connection.sendall(head + form + b"x" * 400_000)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"a line of the file is longer than 300000 bytes" in answer
    deadline = time.monotonic() + 10
    while [path for path in tmp_path.glob("*/*") if path.is_file()]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_batch_that_fills_the_disk_ends_and_keeps_its_answers(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
) -> None:
    running = serve(EchoBackend(pause=0.005), batch_dir=tmp_path, batch_disk_bytes=45_000, batch_concurrency=4)
    client = connect(running)
    batch = ended(client, begin(client, jsonl(*(line(f"{n}", "w " * 20 + str(n)) for n in range(150)))))
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "storage_full"
    assert 0 < batch.request_counts.completed < 150
    assert len(content(client, batch.output_file_id)) == batch.request_counts.completed


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


def test_output_files_expire_when_it_was_asked(client: openai.OpenAI) -> None:
    batch = ended(
        client, begin(client, jsonl(line("a")), output_expires_after={"anchor": "created_at", "seconds": 3600})
    )
    found = client.files.retrieve(batch.output_file_id)
    assert found.expires_at == found.created_at + 3600
    sent = client.files.create(
        file=("a", jsonl(line("a"))), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert sent.expires_at == sent.created_at + 7200


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


def test_who_asks_now_is_not_behind_a_batch(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(
        EchoBackend(pause=0.02), batch_dir=tmp_path, max_concurrent=4, max_queue=64, batch_concurrency=4, cache=None
    )
    client = connect(running)
    batch = begin(client, jsonl(*(line(f"{number}", f"a b c {number}") for number in range(1000))))
    while running.backend.running < 4:
        time.sleep(0.01)
    for _ in range(5):
        before = running.backend.started
        client.chat.completions.create(model="echo-vl", messages=[{"role": "user", "content": "now"}])
        # At most what was under way, and what was let in meanwhile, came first.
        assert running.backend.started - before <= 16
    client.batches.cancel(batch.id)
    assert ended(client, batch).status == "cancelled"


def test_failures_of_the_backend_are_tried_again(serve: Callable[..., Running], tmp_path: Path, connect: Any) -> None:
    running = serve(batch_dir=tmp_path, cache=None)
    client = connect(running)
    running.backend.not_ready = "busy with something else"
    batch = begin(client, jsonl(line("a"), line("b")))
    while running.metric("qvl_batch_requests_running") < 2:
        time.sleep(0.02)
    time.sleep(0.5)
    running.backend.not_ready = None
    assert ended(client, batch).request_counts.completed == 2


def test_a_key_that_is_withdrawn_stops_its_batch_and_a_returned_one_goes_on(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
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
    before = running.backend.started
    time.sleep(1.5)
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


def test_a_folder_that_cannot_be_written_is_told_without_its_path(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
) -> None:
    (tmp_path / "file").write_text("")
    client = connect(serve(batch_dir=tmp_path / "file" / "batches"))
    with pytest.raises(openai.InternalServerError) as caught:
        upload(client, jsonl(line("a")))
    assert caught.value.code == "storage_failed"
    assert str(tmp_path) not in str(caught.value)


def test_a_server_without_a_folder_says_so(serve: Callable[..., Running], connect: Any) -> None:
    client = connect(serve())
    for call in (client.files.list, client.batches.list):
        with pytest.raises(openai.NotFoundError, match="--batch-dir"):
            call()


def test_nothing_is_written_before_the_first_file(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    assert list(client.files.list()) == []
    assert list(client.batches.list()) == []
    assert list(tmp_path.iterdir()) == []
