"""Large bodies, read past the HTTP parser: whole and in pieces, late, cut off, too many, over TLS."""

from __future__ import annotations

import base64
import io
import json
import socket
import ssl
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme
from PIL import Image

from tests.server.conftest import Running, question, start
from tests.server.processes import CHAT
from tests.server.test_http import request
from tests.server.test_load import until


@pytest.fixture(scope="module")
def body() -> bytes:
    # Every byte of a PNG is under a checksum, so that one that arrived wrong is refused.
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (400, 600, 3), dtype=np.uint8)).save(held, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
    made = json.dumps(question("hello", url)).encode()
    assert len(made) > 500_000
    return made


def answers(sock: socket.socket, count: int) -> list[dict]:
    """The JSON of so many answers, each with its status."""
    reader = sock.makefile("rb")
    found = []
    for _ in range(count):
        status = int(reader.readline().split()[1])
        length = 0
        while (line := reader.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        found.append({"status": status, **json.loads(reader.read(length))})
    return found


def said(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("size", [1_000, 65_536, 65_537, 200_000, 10_000_000])
def test_it_is_whole_however_it_is_cut(server: Running, body: bytes, size: int) -> None:
    sent = request(body)
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        for start_ in range(0, len(sent), size):
            sock.sendall(sent[start_ : start_ + size])
        (answer,) = answers(sock, 1)
    assert said(answer).endswith("hello")


def test_the_next_request_follows_at_once(server: Running, body: bytes) -> None:
    small = request(json.dumps(question("small")).encode())
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        sock.sendall(small + request(body) + small + request(body))
        found = [said(answer).split()[-1] for answer in answers(sock, 4)]
        sock.sendall(request(body))
        found.append(said(answers(sock, 1)[0]).split()[-1])
    assert found == ["small", "hello", "small", "hello", "hello"]


def test_who_asks_before_it_sends_is_told_to_go_on(server: Running, body: bytes) -> None:
    head, _, _ = request(body, headers=("Host: x", "Expect: 100-continue")).partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert said(answers(sock, 1)[0]).endswith("hello")


def test_one_that_is_cut_off_ends_and_is_counted_off(server: Running, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        sock.sendall(request(body)[:300_000])
        until(lambda: server.core.held_bytes > 200_000)
    until(lambda: server.core.held_bytes == 0 and server.core.requests_under_way == 0)


def test_one_that_comes_too_slowly_is_told_so(serve, body: bytes) -> None:
    server = serve(body_timeout=0.3, body_rate=10_000_000)
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        sock.sendall(request(body)[:300_000])
        (answer,) = answers(sock, 1)
    assert (answer["status"], answer["error"]["code"]) == (408, "request_timeout")


def test_one_that_comes_steadily_has_its_time(serve, body: bytes) -> None:
    # Less than it takes in all, and far more than it takes to go on.
    server = serve(body_timeout=0.8, body_rate=100_000)
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        for start_ in range(0, len(body) + 500, 100_000):
            sock.sendall(request(body)[start_ : start_ + 100_000])
            time.sleep(0.15)
        assert said(answers(sock, 1)[0]).endswith("hello")


def test_one_for_which_there_is_no_memory_is_told_so_and_need_not_be_sent_to_its_end(serve, body: bytes) -> None:
    server = serve(max_held_bytes=200_000)
    for part in (len(body) + 500, 400_000):
        with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
            sock.sendall(request(body)[:part])
            (answer,) = answers(sock, 1)
        assert (answer["status"], answer["error"]["code"]) == (429, "engine_overloaded")
        until(lambda: server.core.held_bytes == 0)


def test_announcing_one_takes_no_memory(server: Running) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 60000000\r\n\r\n{{"
    waiting = [socket.create_connection(("127.0.0.1", server.port), 30) for _ in range(20)]
    for sock in waiting:
        sock.sendall(head.encode())
    until(lambda: server.core.requests_under_way == 20)
    assert resident() - before < 30_000_000
    for sock in waiting:
        sock.close()
    until(lambda: server.core.requests_under_way == 0)


def test_it_comes_over_tls(tmp_path: Path, body: bytes) -> None:
    authority = trustme.CA()
    file = tmp_path / "both"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(file)
    running = start(tls=(str(file), str(file)), wait=False)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    try:
        url = running.url.replace("http:", "https:")
        with httpx.Client(base_url=url, verify=trusting, trust_env=False, timeout=30) as client:
            while client.get("/ready").status_code != 200:
                pass
            for _ in range(2):
                answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
                assert said(answer.json()).endswith("hello")
    finally:
        running.stop()
