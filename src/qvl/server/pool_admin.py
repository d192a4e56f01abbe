"""The endpoints of a server with a pool: their metrics, and their replacement at runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qvl.backends.base import Backend
from qvl.backends.wrapper import WrappingBackend
from qvl.errors import ConfigError, QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from qvl.backends.openai.endpoint_list import Listed
    from qvl.backends.openai.pool import EndpointState

Source: TypeAlias = "Callable[[], Sequence[str | Listed]]"
STATES: Final = ("up", "busy", "trial", "resting", "draining")
log = logger("qvl.server")


@runtime_checkable
class Pooled(Protocol):
    """A backend whose endpoints can be replaced at runtime."""

    def endpoints(self) -> Sequence[EndpointState]: ...

    async def set_endpoints(self, base_url: Iterable[str | Listed]) -> None: ...


@runtime_checkable
class Quarantining(Protocol):
    """A backend that refuses pictures which killed engines."""

    def release_pictures(self) -> None: ...


def pooled(backend: Backend) -> Pooled | None:
    """Return `backend` or the backend it wraps, whichever is a pool; else None."""
    while isinstance(backend, WrappingBackend):
        backend = backend.inner
    return backend if isinstance(backend, Pooled) else None


class EndpointStats(Collector):
    """A collector of each endpoint's metrics; the label `endpoint` is its URL without secrets."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        pool = pooled(self._backend)
        if pool is None:
            return
        states = pool.endpoints()
        for name, text in (("requests", "Requests sent to the endpoint."), ("failures", "Requests that failed.")):
            counter = CounterMetricFamily(f"qvl_endpoint_{name}", text, labels=["endpoint"])
            for state in states:
                counter.add_metric([state.url], getattr(state, name))
            yield counter
        gauges: tuple[tuple[str, str, str], ...] = (
            ("requests_running", "running", "Requests at the endpoint."),
            ("picture_tokens", "picture_tokens", "Estimated prompt tokens of its running requests."),
            ("first_token_seconds", "first_token", "Seconds to the first token, a moving average."),
            ("rest_seconds", "rest_seconds", "Seconds until the endpoint is tried again."),
            ("weight", "weight", "Its share of the load."),
            ("limit", "limit", "The limit of concurrent requests; absent without a limit."),
        )
        for name, attribute, text in gauges:
            gauge = GaugeMetricFamily(f"qvl_endpoint_{name}", text, labels=["endpoint"])
            for state in states:
                if (value := getattr(state, attribute)) is not None:
                    gauge.add_metric([state.url], value)
            yield gauge
        gauge = GaugeMetricFamily("qvl_endpoint_state", "1 for its state, else 0.", labels=["endpoint", "state"])
        for state in states:
            for name in STATES:
                gauge.add_metric([state.url, name], float(state.state == name))
        yield gauge


def release_pictures(backend: Backend) -> None:
    """Release the pictures that `backend`, or the one it wraps, keeps in quarantine."""
    while isinstance(backend, WrappingBackend):
        backend = backend.inner
    if isinstance(backend, Quarantining):
        backend.release_pictures()


def source_of(file: str | None, *, configured: bool) -> Source | None:
    """Return a function that reads the endpoints from `file`, or if `configured` from the config file; else None."""
    if file is not None:
        path = file

        def listed() -> Sequence[str | Listed]:
            from qvl.backends.openai.endpoint_list import read_endpoint_list

            return read_endpoint_list(path)

        return listed
    return _configured if configured else None


def divided_source(source: Source, share: Callable[[int], int]) -> Source:
    """Return `source` with `share` of each endpoint's limit, at least 1, for one of several server processes."""

    def divided() -> Sequence[str | Listed]:
        from dataclasses import replace

        return [
            one if isinstance(one, str) or one.limit is None else replace(one, limit=max(1, share(one.limit)))
            for one in source()
        ]

    return divided


def _configured() -> Sequence[str | Listed]:
    from qvl import config

    serve = {name.replace("-", "_"): value for name, value in config.load().serve.items()}
    urls = serve.get("base_url")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ConfigError(f"{config.config_path()} lists no endpoints", hint='[serve] base-url = ["http://host:8000"]')
    return urls


async def reload_endpoints(backend: Backend, source: Source) -> None:
    """Replace the endpoints by those that `source` lists now; if it cannot be read, keep the old ones."""
    pool = pooled(backend)
    if pool is None:
        return
    try:
        await pool.set_endpoints(source())
    except QvlError as exc:
        log.error("the endpoints were not reloaded, the old ones remain", error=str(exc))
