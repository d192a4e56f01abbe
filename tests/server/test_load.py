"""Too much at a time, clients that vanish or dawdle, and limits for each key."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pipeline.conftest import followers
from tests.server.conftest import Running, data_url, question
from tests.server.echo_backend import EchoBackend

CHAT = "/v1/chat/completions"
# Its answer ends when a test has seen enough, and sets the backend's pause to 0.
LONG = "word " * 300


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)


def raw_request(body: dict, path: str = CHAT) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_what_exceeds_the_queue_is_told_when_to_come_again(serve) -> None:
    server = serve(EchoBackend(pause=0.05), cache="off", max_concurrent=2, max_queue=3)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(server.post, CHAT, question(f"{LONG} {i}")) for i in range(16)]
        # Two are answered and three wait, so that the others are refused meanwhile.
        until(lambda: sum(one.done() for one in asked) == 11)
        server.backend.pause = 0.0
        answers = [one.result() for one in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 11
    assert len([answer for answer in answers if answer.status_code == 200]) == 5
    for answer in refused:
        assert answer.json()["error"]["code"] == "engine_overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert int(answer.headers["retry-after-ms"]) > 0
    assert server.core.admission.running == 0
    assert server.metric("qvl_admission_rejections_total") == len(refused)


def test_the_queue_is_counted_in_picture_tokens_too(serve) -> None:
    server = serve(EchoBackend(pause=0.1), cache="off", max_concurrent=1, max_queue=50, max_queue_picture_tokens=500)
    url = data_url("red", (512, 512))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, CHAT, question(f"{LONG} {i}", url)) for i in range(8)]
        # One is answered, and of pictures of 256 tokens one may wait.
        until(lambda: sum(one.done() for one in asked) == 6)
        server.backend.pause = 0.0
        assert sorted(one.result().status_code for one in asked) == [200] * 2 + [429] * 6
    assert server.core.admission.waiting_tokens == 0


def test_pictures_that_would_take_too_much_memory_are_refused_before_they_are_decoded(serve) -> None:
    server = serve(EchoBackend(), max_decoded_bytes=2 * 64 * 64 * 4)
    urls = [data_url(colour, (64, 64)) for colour in ("red", "green", "blue")]
    refused = server.post(CHAT, question("all of them", *urls))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"
    assert "12288 pixels" in refused.json()["error"]["message"]
    assert not server.backend.requests
    assert server.post(CHAT, question("two of them", *urls[:2])).status_code == 200
    assert server.post(CHAT, {**question("all of them", *urls), "max_pixels": 1024}).status_code == 200


def test_pictures_that_pass_on_as_they_are_count_nothing(serve) -> None:
    backend = EchoBackend()
    backend.wants_pixels = False
    server = serve(backend, max_decoded_bytes=1)
    assert server.post(CHAT, question("one", data_url("red", (64, 64)))).status_code == 200
    assert server.post(CHAT, question("one", data_url("red", (64, 64), "GIF"))).status_code == 413
    assert server.post(CHAT, {**question("one", data_url("red", (64, 64))), "max_pixels": 1024}).status_code == 413


def test_requests_wait_while_the_pictures_at_work_take_all_the_memory(serve) -> None:
    server = serve(EchoBackend(pause=0.1), cache="off", max_held_bytes=40_000)

    def ask(number: int) -> int:
        return server.post(CHAT, question(f"one two three {number}", data_url("red", (64, 64)))).status_code

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        until(lambda: server.core.admission.waiting >= 4)
        assert server.core.admission.running == 2
        server.backend.pause = 0.0
        assert [one.result() for one in asking] == [200] * 8
    assert server.core.admission.running_bytes == 0


def test_hits_pass_a_full_queue(serve) -> None:
    server = serve(EchoBackend(pause=0.0), max_concurrent=1, max_queue=0)
    server.post(CHAT, question("known"))
    server.backend.pause = 5.0
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(server.post, CHAT, question("one two three"))
        until(lambda: server.backend.running == 1)
        assert server.post(CHAT, question("known")).headers["x-qvl-cache"] == "hit"
        assert server.post(CHAT, question("unknown")).status_code == 429
        server.backend.pause = 0.0
        assert slow.result().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/completions"])
def test_a_client_that_goes_away_aborts_its_work(serve, path: str, stream: bool) -> None:
    server = serve(EchoBackend(pause=0.05))
    text = "word " * 200
    body = {
        CHAT: question(text),
        "/v1/completions": {"prompt": text, "max_tokens": 400},
        "/v1/responses": {"input": text},
    }
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(raw_request({**body[path], "stream": stream}, path))
        until(lambda: server.backend.running == 1)
        if stream:
            assert sock.recv(100)
    until(lambda: server.backend.running == 0)
    assert server.backend.aborted == 1
    assert server.core.admission.running == 0
    until(lambda: server.metric("qvl_requests_aborted_total") == 1)


def test_two_hundred_clients_vanish_and_nothing_stays_behind(serve) -> None:
    server = serve(EchoBackend(pause=0.02), cache="off", max_concurrent=100, max_queue=300)

    async def vanish(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(raw_request({**question(f"{number} " + "word " * 300), "stream": True}))
        await writer.drain()
        await asyncio.sleep(0.3 + number % 10 / 20)
        writer.transport.abort()

    async def all_of_them() -> None:
        await asyncio.gather(*(vanish(number) for number in range(200)))

    asyncio.run(all_of_them())
    until(lambda: server.core.requests_under_way == 0 and server.backend.running == 0, 30)
    assert server.core.admission.running == 0
    assert server.core.admission.waiting == 0
    assert server.core.held_bytes == 0
    assert not server.core.under_way
    assert server.post(CHAT, question("still here")).status_code == 200


def test_one_of_two_who_share_an_answer_may_leave(serve) -> None:
    server = serve(EchoBackend(pause=0.05))
    body = {**question("word " * 40), "stream": True}
    leaver = socket.create_connection(("127.0.0.1", server.port), 10)
    leaver.sendall(raw_request(body))
    until(lambda: server.backend.running == 1)
    with ThreadPoolExecutor(1) as pool:
        stayer = pool.submit(server.post, CHAT, body)
        until(lambda: followers(server.core.pipeline) == 2)
        leaver.close()
        answer = stayer.result()
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.backend.started == 1
    assert server.backend.aborted == 0


def test_slow_senders_are_cut_off_while_others_are_served(serve) -> None:
    server = serve(header_timeout=0.5, body_timeout=0.5)
    slow = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(50)]
    for number, sock in enumerate(slow):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n"
        # A third of them is slow in the headers, a third in the body, and a third says nothing at all.
        sock.sendall((b"", head.encode(), head.encode() + b"\r\n{")[number % 3])
    assert server.post(CHAT, question("meanwhile")).status_code == 200
    for number, sock in enumerate(slow):
        sock.settimeout(10)
        answer = sock.recv(4096)
        assert b"408" in answer.split(b"\r\n")[0], number
        assert b"request_timeout" in answer
        sock.close()
    until(lambda: server.core.requests_under_way == 0)


def test_a_deadline_ends_what_takes_too_long(serve) -> None:
    server = serve(EchoBackend(pause=0.2), cache="off", request_timeout=20)
    body = question("word " * 100)
    answer = server.post(CHAT, body, x_request_timeout="0.3")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    streamed = server.post(CHAT, {**body, "stream": True}, x_request_timeout="3")
    assert streamed.status_code == 200
    assert "deadline_exceeded" in streamed.text.splitlines()[-2]
    assert "[DONE]" not in streamed.text
    until(lambda: server.backend.running == 0)
    assert server.backend.aborted == 2
    for bad in ("soon", "-1", "nan", "inf"):
        assert server.post(CHAT, body, x_request_timeout=bad).status_code == 400


def test_each_key_has_its_own_limits(serve) -> None:
    server = serve(EchoBackend(pause=0.1), api_keys=("a", "b"), requests_per_minute=3)
    states = [server.post(CHAT, question(f"{i}"), authorization="Bearer a") for i in range(5)]
    assert [answer.status_code for answer in states] == [200, 200, 200, 429, 429]
    assert int(states[3].headers["retry-after"]) <= 20
    assert states[0].headers["x-ratelimit-limit-requests"] == "3"
    assert server.post(CHAT, question("z"), authorization="Bearer b").status_code == 200


def test_each_key_may_have_so_many_under_way(serve) -> None:
    server = serve(EchoBackend(pause=0.3), api_keys=("a", "b"), concurrent_per_key=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, CHAT, question(LONG), authorization="Bearer a")
        until(lambda: server.backend.running == 1)
        assert server.post(CHAT, question("x"), authorization="Bearer a").status_code == 429
        assert server.post(CHAT, question("x"), authorization="Bearer b").status_code == 200
        server.backend.pause = 0.0
        assert first.result().status_code == 200
    assert server.post(CHAT, question("x"), authorization="Bearer a").status_code == 200


def test_too_many_bytes_at_once_are_refused(serve) -> None:
    server = serve(max_held_bytes=20_000)
    assert server.post(CHAT, question("x" * 30_000)).status_code == 429
    # A client has its answer a moment before the server has counted the body off.
    until(lambda: server.core.held_bytes == 0)
    assert server.post(CHAT, question("x")).status_code == 200
    until(lambda: server.core.held_bytes == 0)


def test_loading_is_not_ready_but_healthy(serve) -> None:
    server = serve(EchoBackend(load=60), wait=False, canary=True)
    until(lambda: server.get("/health").status_code == 200)
    answer = server.get("/ready")
    assert answer.status_code == 503
    assert "loaded" in answer.json()["reason"]
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["echo-vl"]
    refused = server.post(CHAT, question())
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_not_ready"
    assert "retry-after" in refused.headers
    server.backend.load = 0
    until(lambda: server.get("/ready").status_code == 200)
    assert len(server.backend.requests) == 1  # the canary
    assert len(server.backend.requests[0].pictures) == 1


def test_a_dead_engine_is_not_ready_and_says_so(serve) -> None:
    server = serve(EchoBackend(pause=0.05), cache="off")
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(server.post, CHAT, {**question("word " * 50 + str(i)), "stream": i % 2 == 0}) for i in range(4)
        ]
        until(lambda: server.backend.running == 4)
        server.backend.dead = True
        answers = [one.result() for one in asked]
    for answer in answers:
        assert "engine_dead" in answer.text
        assert answer.status_code in (200, 503)
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 503
    assert "dead" in server.get("/ready").json()["reason"]
    assert server.post(CHAT, question()).status_code == 503
    assert server.metric("qvl_ready") == 0


def test_a_dead_engine_ends_the_server_where_that_is_wanted(serve) -> None:
    server = serve(EchoBackend(pause=0.05), cache="off")
    server.server.exit_on_death()
    server.backend.dead = True
    server.post(CHAT, question())
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert server.server.failure is not None


def test_a_backend_that_is_lost_for_the_process_is_noticed_without_a_request(serve) -> None:
    server = serve(EchoBackend(), cache="off")
    server.backend.gone = "the cluster is another one"
    until(lambda: server.get("/ready").status_code == 503)
    assert server.get("/ready").json()["reason"] == "the cluster is another one"
    ending = serve(EchoBackend(), cache="off")
    ending.server.exit_on_death()
    ending.backend.gone = "the cluster is another one"
    ending.thread.join(20)
    assert not ending.thread.is_alive()
    assert "another one" in str(ending.server.failure)


def test_a_stalled_engine_is_not_ready(serve) -> None:
    server = serve(EchoBackend(pause=3), cache="off", stall_timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.post, CHAT, question("one"))
        until(lambda: server.get("/ready").status_code == 503)
        assert "stalled" in server.get("/ready").json()["reason"]
        assert slow.result().status_code == 200
    assert server.get("/ready").status_code == 200


def test_draining_finishes_what_runs_and_refuses_the_rest(serve) -> None:
    server: Running = serve(EchoBackend(pause=0.05), cache="off")
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.post, CHAT, {**question(f"{LONG} {i}"), "stream": i % 2 == 0}) for i in range(6)]
        until(lambda: server.backend.running == 6)
        server.server._loop.call_soon_threadsafe(setattr, server.core, "draining", True)
        server.server._loop.call_soon_threadsafe(server.server.begin_drain)
        until(lambda: server.core.draining)
        assert server.get("/ready").status_code == 503
        late = server.post(CHAT, question("late"))
        assert late.status_code == 503
        assert late.headers["connection"] == "close"
        server.backend.pause = 0.0
        answers = [one.result() for one in running]
    for answer in answers:
        assert answer.status_code == 200
        assert "[DONE]" in answer.text or answer.json()["choices"][0]["finish_reason"] == "stop"
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert server.backend.aborted == 0


def test_what_outlasts_the_drain_is_told_so(serve) -> None:
    server = serve(EchoBackend(pause=0.3), cache="off", drain_timeout=0.5)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, CHAT, {**question("word " * 100), "stream": True})
        until(lambda: server.backend.running == 1)
        time.sleep(0.4)
        server.server._loop.call_soon_threadsafe(server.server.begin_drain)
        assert "server_shutting_down" in asked.result().text
    server.thread.join(10)
    assert not server.thread.is_alive()
