"""`/v1/files` by OpenAI's own client, over a real server: what is kept, its bounds and its names."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.batches.asking import begin, content, ended, jsonl, line, upload
from tests.server.conftest import Running
from tests.server.echo_backend import EchoBackend


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


def test_what_one_key_is_sending_takes_none_of_the_space_of_another(
    serve: Callable[..., Running], tmp_path: Path, connect: Any
) -> None:
    lines = jsonl(*(line(f"{number}") for number in range(100)))
    running = serve(batch_dir=tmp_path, batch_disk_bytes=4 * len(lines), api_keys=("one", "two"))
    store = running.core.batch_store
    assert store is not None
    theirs, _ = store.begin_upload(running.core.keys.tenant(b"Bearer one", None))
    store.count_upload(theirs, int(1.5 * len(lines)))
    with pytest.raises(openai.RateLimitError):
        upload(connect(running, "one"), lines)
    upload(connect(running, "two"), lines)
    store.drop_upload(theirs)


@pytest.mark.parametrize(
    ("query", "code"),
    [("limit=%D9%A3", "invalid_value"), ("limit=0", "invalid_value"), ("limits=3", "unsupported_parameter")],
)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_a_wrong_page_is_refused(running: Running, path: str, query: str, code: str) -> None:
    answer = running.get(f"{path}?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert answer.json()["error"]["param"] == query.partition("=")[0]


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
