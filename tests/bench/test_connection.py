"""The wire: connections used again, TLS, and endpoints that misbehave."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess

import pytest

from qvl.backends.openai.retry import RetryPolicy
from qvl.bench.exchange import cache_state, server_timing
from qvl.errors import ConfigError
from qvl.http.connection import Pool
from tests.bench.test_load import NO_RETRY, prompts
from tests.scripted_endpoint import Flood, Hang, ScriptedEndpoint, ScriptedExchange, Stall, Text


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://x/v1", "http:///v1", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="invalid endpoint URL"):
        Pool(url)


def test_as_many_connections_as_clients_serve_all_requests(measure, lines) -> None:
    writers: set[int] = set()

    class Counting:
        async def __call__(self, exchange: ScriptedExchange) -> None:
            writers.add(id(exchange.writer))
            await asyncio.sleep(0.01)
            await Text("fine")(exchange)

    with ScriptedEndpoint(default=Counting()) as endpoint:
        measure(lines(*prompts(40)), endpoint, concurrency=4)

    assert len(writers) <= 4


def test_a_connection_that_was_closed_while_idle_costs_no_request(measure, lines) -> None:
    class Closing:
        async def __call__(self, exchange: ScriptedExchange) -> None:
            await exchange.head(headers={"Connection": "close"}, chunked=False)
            await exchange.event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]})
            await exchange.event(b"[DONE]")
            exchange.close()

    with ScriptedEndpoint(default=Closing()) as endpoint:
        summary = measure(lines(*prompts(5)), endpoint, retries=NO_RETRY)

    assert summary.success_rate == 1


def test_an_endpoint_that_says_nothing_more_is_a_timeout_and_is_let_go(measure, lines) -> None:
    for after in (0, 2):
        with ScriptedEndpoint(default=Stall(after)) as endpoint:
            summary = measure(lines(*prompts(2)), endpoint, timeout=0.5, out=f"run{after}")
        assert summary.data["endpoints"][0]["errors"] == {"timeout": 2}


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(Hang(), "connect"), (Flood(), "bad_response"), (Flood(size=2**22, status=500, kind="text/html"), "http_500")],
)
def test_what_is_no_answer_is_a_failure_of_its_kind(answer, kind: str, measure, lines) -> None:
    with ScriptedEndpoint(default=answer) as endpoint:
        summary = measure(lines(*prompts(1)), endpoint, retries=NO_RETRY)

    assert summary.data["endpoints"][0]["errors"] == {kind: 1}


def test_a_connection_that_breaks_is_tried_again(measure, lines, records) -> None:
    with ScriptedEndpoint(Hang()) as endpoint:
        measure(lines(*prompts(1)), endpoint, retries=RetryPolicy(first_delay=0.01))

    assert (records()[0].success, records()[0].retried_for) == (True, ["connect"])


def test_the_key_is_sent_and_a_wrong_one_is_said(bench, lines, tmp_path) -> None:
    with ScriptedEndpoint(api_key="right") as endpoint:
        data = lines(*prompts(1))
        arguments = ("--url", endpoint.url, "-m", "echo", "-d", data, "--no-html")
        good = bench(*arguments, "--api-key", "right", "--out", tmp_path / "a")
        bad = bench(*arguments, "--api-key", "wrong", "--out", tmp_path / "b")

    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "http_401 1" in bad.stdout


def test_cache_states_and_stages_are_read_as_servers_write_them() -> None:
    assert cache_state({"x-qvl-cache": "coalesced"}) == "coalesced"
    assert cache_state({"cache-status": "edge; fwd=uri-miss; stored"}) == "miss"
    assert cache_state({"cache-status": "qvl; hit"}) == "hit"
    assert cache_state({"x-litellm-cache-hit": "False"}) == "miss"
    assert cache_state({}) is None
    assert server_timing("cache;desc=x, queue;dur=12.5, total;dur=oops") == {"queue": 0.0125}


def test_certificates_are_checked_unless_told_otherwise(bench, lines, tmp_path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with ScriptedEndpoint(tls=context) as endpoint:
        arguments = ("--url", endpoint.url, "-d", lines(*prompts(3)), "--no-html")
        refused = bench(*arguments, "--out", tmp_path / "a")
        taken = bench(*arguments, "--insecure", "--out", tmp_path / "b")

    assert refused.exit_code == 1
    assert "certificate" in refused.stderr
    assert taken.exit_code == 0, taken.output
