"""Keys, tenants and the cache's headers."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qvl.caches.memory import MemoryCache
from qvl.errors import CacheError, ConfigError
from qvl.server.auth import KeyRing
from tests.pipeline.conftest import followers
from tests.server.conftest import Running, data_url, question
from tests.server.echo_backend import EchoBackend
from tests.server.test_load import until

CHAT = "/v1/chat/completions"


def test_a_key_is_needed_for_everything_but_health_and_the_page(serve) -> None:
    server = serve(api_keys=("sesame", "second"))
    for path in ("/ready", "/metrics", "/version", "/v1/models", "/openapi.json", "/nope"):
        answer = server.get(path)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert server.get("/health").status_code == 200
    assert server.get("/").status_code == 200
    for wrong in ("Bearer sesam", "Bearer sesamee", "Basic sesame", "sesame", "Bearer"):
        assert server.post(CHAT, question(), authorization=wrong).status_code == 401
    for key in ("sesame", "second"):
        assert server.post(CHAT, question(), authorization=f"Bearer {key}").status_code == 200
    seen = server.get("/metrics", authorization="Bearer sesame").text
    assert "sesame" not in seen
    assert "sesame" not in server.get("/version", authorization="Bearer sesame").text


def test_keys_are_read_again_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one # the shop\n\n# nobody\ntwo\n")
    ring = KeyRing(file=str(file))
    assert ring.tenant(b"Bearer one") != ring.tenant(b"bearer two")
    file.write_text("three\n")
    ring.reload()
    assert ring.tenant(b"Bearer three")
    with pytest.raises(Exception, match="invalid API key"):
        ring.tenant(b"Bearer one")
    file.unlink()
    ring.reload()
    assert ring.tenant(b"Bearer three")
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(file=str(file))


def test_one_tenant_never_gets_anothers_answer(serve) -> None:
    server = serve(api_keys=("a", "b"))
    states = [
        server.post(CHAT, question(), authorization=f"Bearer {key}").headers["x-qvl-cache"]
        for key in ("a", "b", "a", "b")
    ]
    assert states == ["miss", "miss", "hit", "hit"]


def test_one_tenants_prompts_speed_up_no_others_even_if_both_name_one_salt(serve) -> None:
    pytest.importorskip("torch")
    from qvl.backends.local.backend import LocalBackend

    backend = LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20)
    server = serve(backend, cache="off", api_keys=("a", "b"))

    def reused(key: str, path: str = CHAT, **more: Any) -> bool:
        body = {"messages": [{"role": "user", "content": "What brand is it? " * 12}], "max_tokens": 2, **more}
        if path != CHAT:
            body = {"input": body["messages"][0]["content"], "max_output_tokens": 2, **more}
        answer = server.post(path, body, authorization=f"Bearer {key}")
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        return details["cached_tokens"] > 0

    assert [reused(key) for key in ("a", "b", "a", "b")] == [False, False, True, True]
    assert [reused(key, cache_salt="ours") for key in ("a", "b", "b")] == [False, False, True]
    assert [reused("a", cache_salt="other"), reused("a", "/v1/responses", cache_salt="other")] == [False, True]
    refused = server.post(CHAT, {"messages": [], "cache_salt": ""}, authorization="Bearer a")
    assert refused.status_code == 400


def test_cache_headers_say_where_the_answer_came_from(serve) -> None:
    server = serve()

    def ask(control: str = "", **body: object):
        headers = {"cache_control": control} if control else {}
        answer = server.post(CHAT, {**question("x", data_url()), **body}, **headers)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-qvl-cache"], answer.headers["cache-status"], answer

    assert ask()[:2] == ("miss", "qvl; fwd=uri-miss; stored")
    state, status, answer = ask()
    assert (state, status) == ("hit", "qvl; hit")
    assert int(answer.headers["age"]) >= 0
    assert ask("no-cache")[:2] == ("miss", "qvl; fwd=request; stored")
    assert ask("no-store")[:2] == ("bypass", "qvl; fwd=bypass")
    assert ask("max-age=100")[0] == "hit"
    assert ask("max-age=0")[0] == "miss"
    assert ask(temperature=1.0)[:2] == ("bypass", "qvl; fwd=bypass")
    assert server.post(CHAT, question(), cache_control="max-age=soon").status_code == 400
    streamed = server.post(CHAT, {**question("x", data_url()), "stream": True})
    assert streamed.headers["x-qvl-cache"] == "hit"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert "age" in streamed.headers


def test_a_stream_says_where_it_comes_from_too(serve) -> None:
    server = serve(EchoBackend(pause=0.1))

    def ask(control: str = "", text: str = "one two three") -> tuple[str, str, bool]:
        headers = {"cache_control": control} if control else {}
        answer = server.post(CHAT, {**question(text), "stream": True}, **headers)
        assert answer.text.endswith("data: [DONE]\n\n")
        return answer.headers["x-qvl-cache"], answer.headers["cache-status"], "age" in answer.headers

    assert ask("no-store") == ("bypass", "qvl; fwd=bypass", False)
    barrier = threading.Barrier(2)

    def together(_: int) -> tuple[str, str, bool]:
        barrier.wait()
        return ask()

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(together, range(2)))
    assert found[-1] == ("miss", "qvl; fwd=uri-miss; stored", False)
    assert found[0] in (("coalesced", "qvl; fwd=uri-miss; collapsed", False), ("hit", "qvl; hit", True))
    assert ask() == ("hit", "qvl; hit", True)
    assert ask("max-age=100") == ("hit", "qvl; hit", True)
    assert ask("no-cache") == ("miss", "qvl; fwd=request; stored", False)


def test_an_old_answer_is_asked_anew(serve) -> None:
    server = serve()
    server.post(CHAT, question())
    assert server.post(CHAT, question(), cache_control="max-age=60").headers["x-qvl-cache"] == "hit"
    cache = server.core.executor.store.cache
    for key, entry in list(cache.items()):
        cache.set(key, dataclasses.replace(entry, created_at=entry.created_at - 120))
    assert server.post(CHAT, question(), cache_control="max-age=60").headers["x-qvl-cache"] == "miss"


def test_requests_under_way_are_shared(serve) -> None:
    server = serve(EchoBackend(pause=0.1))
    barrier = threading.Barrier(6)

    def ask(_: int) -> str:
        barrier.wait()
        return server.post(CHAT, question("word " * 300)).headers["x-qvl-cache"]

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        until(lambda: followers(server.core.pipeline) == 6)
        server.backend.pause = 0.0
        states = sorted(one.result() for one in asked)
    assert states == ["coalesced"] * 5 + ["miss"]
    assert server.backend.started == 1


class GoneCache(MemoryCache):
    """A store that went away."""

    instant = False

    def get(self, *args, **options):
        raise CacheError("the store is gone")

    set = lease = release = get  # type: ignore[assignment]


def test_a_store_that_is_gone_costs_no_answer(serve) -> None:
    server = serve(cache=GoneCache())
    for number in range(3):
        answer = server.post(CHAT, question(f"number {number}"))
        assert answer.status_code == 200
        assert answer.headers["x-qvl-cache"] == "miss"
    assert server.metric("qvl_cache_failures") >= 3
    assert server.get("/ready").status_code == 200


class SlowCache(MemoryCache):
    """One that has to wait for a disk, and counts how often it is asked."""

    instant = False
    reads = 0

    def get(self, key: str):
        self.reads += 1
        return super().get(key)


@pytest.mark.parametrize(("seconds", "reads"), [(30.0, 3), (0.0, 6)])
def test_what_many_ask_for_is_looked_up_once(serve, seconds: float, reads: int) -> None:
    cache = SlowCache()
    server = serve(cache=cache, hot_seconds=seconds)
    states = [server.post(CHAT, question("a favourite")).headers["x-qvl-cache"] for _ in range(5)]
    assert states == ["miss", "hit", "hit", "hit", "hit"]
    # The first request looks before and after it has the lease.
    assert cache.reads == reads


def test_request_ids_are_taken_made_and_passed_on(serve) -> None:
    server = serve()
    answer = server.post(CHAT, question(), x_request_id="shop-42")
    assert answer.headers["x-request-id"] == "shop-42"
    assert server.backend.requests[-1].request_id == "shop-42"
    made = server.post(CHAT, question("y"), x_request_id="bad id\twith blanks").headers["x-request-id"]
    assert made.startswith("qvl-")


def test_cors_is_off_unless_asked(serve) -> None:
    headers = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    closed, opened = serve(), serve(cors_origins=("https://shop.example",))
    with closed.client() as client:
        assert "access-control-allow-origin" not in client.options(CHAT, headers=headers).headers
    with opened.client() as client:
        found = client.options(CHAT, headers=headers)
        assert found.headers["access-control-allow-origin"] == "https://shop.example"


def test_metrics_have_vllms_names(server: Running) -> None:
    server.post(CHAT, question("metrics please", data_url("blue")))
    text = server.get("/metrics").text
    for name in (
        "qvl_num_requests_running",
        "qvl_num_requests_waiting",
        "qvl_time_to_first_token_seconds_bucket",
        "qvl_inter_token_latency_seconds_bucket",
        "qvl_e2e_request_latency_seconds_bucket",
        "qvl_request_queue_time_seconds_bucket",
        "qvl_prompt_tokens_total",
        "qvl_generation_tokens_total",
        "qvl_cache_requests_total",
        "qvl_media_pictures_total",
        "qvl_request_success_total",
    ):
        assert name in text, name
    assert server.metric("qvl_prompt_tokens_total") > 0
