"""OpenTelemetry: one span for each request to the model, under the semantic conventions for generative AI.

Source of the names: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/. Prompts, pictures, answers and
keys are never in a span. Without a tracer provider, OpenTelemetry is not imported.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

from qvl._version import __version__
from qvl.errors import ConfigError, MissingDependencyError
from qvl.http.trace_context import CARRIED
from qvl.log import logger
from qvl.suggest import install_line

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.trace import Span, TracerProvider
    from opentelemetry.util.types import AttributeValue
    from starlette.types import Scope

    from qvl.types import ChatRequest, Result

_OPERATIONS: Final = {
    "/v1/completions": "text_completion",
    "/v1/analyze": "generate_content",
    "/v1/locate": "generate_content",
}
_ADDRESSES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SAMPLING: Final = ("max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
log = logger("qvl.server")


class TracedExchange(Protocol):
    """The properties of an HTTP exchange that a span records."""

    path: str
    method: str
    request_id: str
    headers: dict[bytes, bytes]
    scope: Scope
    fields: dict[str, object]
    status: int
    streaming: bool


class Tracing:
    """Creates the spans of one server."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, propagate, trace

        self.tracer = provider.get_tracer("qvl.server", __version__)
        self.context = context
        self.propagate = propagate
        self.trace = trace

    def begin(self, exchange: TracedExchange, route: str) -> Traced:
        """Open the span of `exchange` at `route`, a child of its `traceparent` header."""
        return Traced(self, exchange, route)


class Traced:
    """The span of one request, from its arrival to the last byte of its answer."""

    __slots__ = ("_carried", "_exchange", "_in", "_out", "_read", "_seen", "_token", "_tracing", "reasons", "span")

    def __init__(self, tracing: Tracing, exchange: TracedExchange, route: str) -> None:
        self._tracing = tracing
        self._exchange = exchange
        self._in = self._out = self._read = self._seen = 0
        self.reasons: list[str] = []
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers.items()}
        name = _OPERATIONS.get(route, "chat")
        host, port = exchange.scope.get("server") or ("", None)
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": name,
            "gen_ai.provider.name": "qvl",
            "http.request.method": exchange.method,
            "http.route": route,
            "url.scheme": exchange.scope.get("scheme", "http"),
            "qvl.request_id": exchange.request_id,
        }
        if host:
            attributes["server.address"] = host
        if port:
            attributes["server.port"] = port
        self.span: Span = tracing.tracer.start_span(
            name, context=tracing.propagate.extract(headers), kind=tracing.trace.SpanKind.SERVER, attributes=attributes
        )
        self._token = tracing.context.attach(tracing.trace.set_span_in_context(self.span))
        carried: dict[str, str] = {}
        tracing.propagate.inject(carried)
        self._carried = CARRIED.set(carried)
        context = self.span.get_span_context()
        if context.is_valid:
            exchange.fields["trace_id"] = f"{context.trace_id:032x}"

    def note_request(self, request: ChatRequest, model: str) -> None:
        """Record model and sampling parameters of a request, but no content."""
        sampling = request.sampling
        attributes: dict[str, AttributeValue] = {"gen_ai.request.model": model}
        for name in _SAMPLING:
            value = getattr(sampling, name)
            if value is not None:
                attributes[f"gen_ai.request.{name}"] = value
        if sampling.top_k > 0:
            attributes["gen_ai.request.top_k"] = float(sampling.top_k)
        if sampling.n != 1:
            attributes["gen_ai.request.choice.count"] = sampling.n
        if request.response_format.kind != "text":
            attributes["gen_ai.output.type"] = "json" if request.response_format.kind.startswith("json") else "text"
        self.span.update_name(f"{_OPERATIONS.get(self._exchange.path, 'chat')} {model}")
        self.span.set_attributes(attributes)

    def note_result(self, result: Result, model: str) -> None:
        """Record the usage of an answer; several prompts of one request are summed."""
        usage = result.usage
        self._in += usage.prompt_tokens
        self._out += usage.completion_tokens
        self._read += usage.cached_tokens
        self._seen += usage.image_tokens
        self.reasons += [choice.finish_reason for choice in result.choices]
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": self.reasons,
            "gen_ai.usage.input_tokens": self._in,
            "gen_ai.usage.output_tokens": self._out,
            "gen_ai.usage.cache_read.input_tokens": self._read,
            "gen_ai.usage.image.input_tokens": self._seen,
            "qvl.cache": result.cache,
        }
        if self._exchange.streaming and result.timing.first_token:
            attributes["gen_ai.response.time_to_first_chunk"] = result.timing.first_token
        self.span.update_name(f"{_OPERATIONS.get(self._exchange.path, 'chat')} {model}")
        self.span.set_attributes(attributes)

    def end(self) -> None:
        """Close the span with the HTTP status of the answer."""
        exchange, trace = self._exchange, self._tracing.trace
        status = exchange.fields.get("error_status", exchange.status)
        attributes: dict[str, AttributeValue] = {"http.response.status_code": exchange.status}
        if exchange.streaming:
            attributes["gen_ai.request.stream"] = True
        error = "client_disconnected" if exchange.fields.get("aborted") else exchange.fields.get("error")
        if error is not None:
            attributes["error.type"] = str(error)
            # A client's own mistake is not a fault of this span: the conventions leave its status unset.
            if isinstance(status, int) and status >= 500:
                self.span.set_status(trace.Status(trace.StatusCode.ERROR))
        self.span.set_attributes(attributes)
        CARRIED.reset(self._carried)
        self._tracing.context.detach(self._token)
        self.span.end()


def active_tracing(provider: TracerProvider | None = None) -> Tracing | None:
    """Return tracing with `provider`, or with the process's global one; None without either."""
    if provider is None:
        # Whoever has set a provider has imported this; nobody needs to pay for it otherwise.
        trace = sys.modules.get("opentelemetry.trace")
        if trace is None:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return None
    return Tracing(provider)


def exporting(endpoint: str | None) -> SdkProvider | None:
    """Return a provider that exports spans by OTLP over HTTP to `endpoint`, else to the OTEL_EXPORTER_OTLP_* address.

    None if neither is set, or without `endpoint` if the process already has a provider.

    Raises:
        ConfigError: `endpoint` is not an http(s) URL.
        MissingDependencyError: `endpoint` is set but the packages are missing.
    """
    if endpoint is None and (not any(os.environ.get(name) for name in _ADDRESSES) or active_tracing() is not None):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        if endpoint is None:
            log.warning("no traces are sent", reason=f"the package {exc.name} is missing", hint=install_line("otel"))
            return None
        raise MissingDependencyError(f"traces need the package {exc.name!r}", hint=install_line("otel")) from exc
    resource = {"service.version": __version__}
    if not (os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")):
        resource["service.name"] = "qvl"
    provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
    exporter = OTLPSpanExporter() if endpoint is None else OTLPSpanExporter(endpoint=_traces_url(endpoint))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    # What the exporter has to say belongs to the log lines of this server.
    exporter_log = logging.getLogger("opentelemetry")
    exporter_log.handlers[:] = logging.getLogger("qvl").handlers
    exporter_log.propagate = not exporter_log.handlers
    return provider


def _traces_url(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"invalid --otlp-traces-endpoint {endpoint!r}", hint="such as http://collector:4318/v1/traces"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
