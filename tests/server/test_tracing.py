"""Traces: one span a request under the conventions for generative AI, joined to those before and behind it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from qvl.backends.openai.backend import OpenAIBackend
from qvl.server.tracing import active_tracing
from tests.scripted_endpoint import ScriptedEndpoint, Status
from tests.server.conftest import data_url, question
from tests.server.echo_backend import EchoBackend
from tests.server.test_load import raw_request, until

CHAT = "/v1/chat/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans: InMemorySpanExporter) -> Iterator[TracerProvider]:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(spans))
    yield made
    made.shutdown()


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    # The answer reaches the client a moment before its span is closed.
    until(spans.get_finished_spans)
    (span,) = spans.get_finished_spans()
    spans.clear()
    return span


def test_a_span_tells_of_the_request_and_its_answer_but_nothing_that_was_said(serve, provider, spans) -> None:
    server = serve(tracer_provider=provider)
    body = {**question("a secret question", data_url()), "temperature": 0.5, "seed": 7, "n": 2, "max_tokens": 40}
    answer = server.post(CHAT, body, traceparent=PARENT, x_request_id="shop-1")
    span = only(spans)
    usage = answer.json()["usage"]
    assert span.name == "chat echo-vl"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "qvl",
        "gen_ai.request.model": "echo-vl",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.model": "echo-vl",
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.image.input_tokens": usage["prompt_tokens_details"]["image_tokens"],
        "server.address": "127.0.0.1",
        "server.port": server.port,
        "url.scheme": "http",
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "qvl.request_id": "shop-1",
        "qvl.cache": "miss",
    }
    assert "secret" not in span.to_json()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


def test_a_span_that_cannot_be_begun_leaves_no_request_under_way(serve, provider, monkeypatch) -> None:
    server = serve(tracer_provider=provider)
    monkeypatch.setattr(server.core.tracing, "begin", lambda *_: 1 / 0)
    assert server.post(CHAT, question()).status_code == 500
    until(lambda: not server.core.requests_under_way)


def test_streams_other_verbs_and_hits_have_their_spans(serve, provider, spans) -> None:
    server = serve(tracer_provider=provider)
    asked = [
        (CHAT, {**question("one two"), "stream": True}, "chat"),
        (CHAT, question("one two"), "chat"),
        ("/v1/completions", {"prompt": ["one", "two three"]}, "text_completion"),
        ("/v1/responses", {"input": "four", "text": {"format": {"type": "json_object"}}}, "chat"),
        ("/v1/analyze", {"image": data_url("blue")}, "generate_content"),
    ]
    found = []
    for path, body, name in asked:
        assert server.post(path, body).status_code == 200
        found.append(dict(only(spans).attributes))
        assert found[-1]["gen_ai.operation.name"] == name
        assert found[-1]["http.route"] == path
        assert found[-1]["gen_ai.usage.output_tokens"] > 0
    assert found[0]["gen_ai.request.stream"] is True
    assert found[0]["gen_ai.response.time_to_first_chunk"] > 0
    assert [one["qvl.cache"] for one in found] == ["miss", "hit", "miss", "miss", "miss"]
    assert found[2]["gen_ai.response.finish_reasons"] == ("stop", "stop")
    assert found[2]["gen_ai.usage.output_tokens"] == 3
    assert found[3]["gen_ai.output.type"] == "json"
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert server.get(path).status_code == 200
    assert not spans.get_finished_spans()


def test_a_failed_request_says_what_it_failed_with(serve, provider, spans) -> None:
    server = serve(EchoBackend(pause=0.05), tracer_provider=provider, cache="off")
    server.post(CHAT, {**question(), "temperature": -1})
    mistake = only(spans)
    assert (mistake.attributes["error.type"], mistake.attributes["http.response.status_code"]) == ("invalid_value", 400)
    assert mistake.status.status_code is StatusCode.UNSET
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(raw_request(question("word " * 100)))
        until(lambda: server.backend.running == 1)
    assert only(spans).attributes["error.type"] == "client_disconnected"
    server.backend.dead = True
    server.post(CHAT, question())
    fault = only(spans)
    assert (fault.attributes["error.type"], fault.status.status_code) == ("engine_dead", StatusCode.ERROR)


def test_the_trace_goes_on_to_a_remote_endpoint(serve, provider, spans) -> None:
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Status(503))
        backend = OpenAIBackend("echo", base_url=endpoint.url, probe=False)
        server = serve(backend, tracer_provider=provider)
        assert server.post(CHAT, question(), traceparent=PARENT, tracestate="shop=1").status_code == 200
        span = only(spans)
        assert len(endpoint.chats) == 2
        for chat in endpoint.chats:
            assert chat.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
            assert chat.headers["tracestate"] == "shop=1"
        server.stop()


def test_without_a_provider_there_is_nothing(serve) -> None:
    with ScriptedEndpoint() as endpoint:
        server = serve(OpenAIBackend("echo", base_url=endpoint.url, probe=False))
        assert server.core.tracing is None
        assert server.post(CHAT, question(), traceparent=PARENT).status_code == 200
        assert "traceparent" not in endpoint.chats[0].headers
        server.stop()


def test_a_process_without_the_packages_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    assert active_tracing() is None
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]
