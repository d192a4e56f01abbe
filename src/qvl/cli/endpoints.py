"""`qvl endpoints`: the current pool of a running server, or the capabilities of endpoints, tested one by one."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

import typer

from qvl.cli import options
from qvl.cli.terminal import print_json
from qvl.errors import AuthError, BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from qvl.backends.openai.endpoint_list import Listed
    from qvl.backends.openai.inspect_endpoint import Examined

PREFIX: Final = "qvl_endpoint_"
# Whole numbers, in the order of the table's columns.
SHOWN: Final = ("requests_running", "picture_tokens", "requests_total", "failures_total")
_SERIES: Final = re.compile(rf"^{PREFIX}(\w+)\{{(.*)\}} (\S+)$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_BAD_STATES: Final = {"resting": "red", "trial": "yellow", "busy": "yellow", "draining": "dim"}


def endpoints(
    url: Annotated[
        str | None, typer.Option(envvar="QVL_URL", help="A running qvl-serve: the counters of its pool.")
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option("--base-url", help="An endpoint to examine; may be repeated.")
    ] = None,
    base_url_file: Annotated[
        str | None, typer.Option("--base-url-file", help="Endpoints to examine, one a line.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Which model to examine; default: the only one.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each answer.")] = 30.0,
    insecure: Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.1, help="With --url: show it anew every so many seconds.")
    ] = None,
    as_json: options.JsonOnly = False,
) -> None:
    """Show the endpoints of a server's pool (--url), or test the capabilities of endpoints (--base-url).

    The key comes from QVL_API_KEY, for endpoints else from OPENAI_API_KEY. A test costs each endpoint about a dozen
    requests of a few tokens. Exit code 1 when an endpoint cannot be asked.
    """
    options.start_logs(verbose=False)
    if bool(url) == bool(base_url or base_url_file):
        raise ConfigError(
            "give either a server or endpoints", hint="--url http://host:8000, or --base-url http://host:8000/v1"
        )
    if url:
        well = _watch(url, watch, timeout=timeout, verify=not insecure, as_json=as_json)
    elif watch is not None:
        raise ConfigError("--watch works only with --url", hint="--url http://host:8000")
    else:
        well = _examine(_listed(base_url, base_url_file), model, timeout, verify=not insecure, as_json=as_json)
    if not well:
        raise typer.Exit(1)


def _listed(urls: Sequence[str] | None, file: str | None) -> list[Listed]:
    from qvl.backends.openai.endpoint_list import Listed, by_name, read_endpoint_list

    return list(by_name([*(Listed(url) for url in urls or ()), *(read_endpoint_list(file) if file else ())]).values())


def _watch(url: str, every: float | None, *, timeout: float, verify: bool, as_json: bool) -> bool:
    from qvl.cli.console import stdout

    def read() -> list[PoolEndpoint]:
        return read_metrics(_fetch(url, timeout, verify), url)

    def show() -> None:
        if as_json:
            print_json({"server": url, "endpoints": [endpoint.to_json() for endpoint in pool]})
        else:
            stdout().print(pool_table(pool))

    pool = read()
    if every is None:
        show()
    elif as_json:
        while True:
            show()
            time.sleep(every)
            pool = read()
    else:
        from rich.live import Live

        with Live(pool_table(pool), console=stdout(), auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(pool_table(read()), refresh=True)
    return all(endpoint.state != "resting" for endpoint in pool)


def _fetch(url: str, timeout: float, verify: bool) -> str:
    """Return the metrics of the server at `url`.

    Raises:
        ConfigError: `url` is not the address of a server.
        AuthError: the server refuses the key.
        BackendUnavailableError: the server does not answer.
    """
    import os

    import httpx

    from qvl.backends.openai.transport import through_proxies

    base, question, query = url.partition("?")
    base = base.rstrip("/").removesuffix("/v1").removesuffix("/metrics")
    key = os.environ.get("QVL_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client: httpx.Client = through_proxies(httpx.Client, url=base, timeout=timeout, verify=verify, headers=headers)
    try:
        with client:
            answer = client.get(f"{base}/metrics{question}{query}")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
        raise ConfigError(f"invalid server address {url!r}", hint="such as http://host:8000") from exc
    except httpx.HTTPError as exc:
        raise BackendUnavailableError(f"{base} does not answer: {exc or type(exc).__name__}") from exc
    if answer.status_code in (401, 403):
        raise AuthError(f"{base} refuses the key", hint="set QVL_API_KEY")
    if answer.status_code != 200:
        raise BackendUnavailableError(f"{base}/metrics answered {answer.status_code}", hint="is --url a qvl-serve?")
    return answer.text


@dataclass(slots=True)
class PoolEndpoint:
    """One endpoint of a running server's pool; `numbers` are its metrics by name."""

    url: str
    state: str = "unknown"
    numbers: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {"url": self.url, "state": self.state, **self.numbers}


def read_metrics(text: str, url: str) -> list[PoolEndpoint]:
    """Return the endpoints in `text`, a server's Prometheus metrics; `url` names the server in errors.

    Raises:
        ConfigError: the metrics have no endpoints.
    """
    endpoints: dict[str, PoolEndpoint] = {}
    for line in text.splitlines():
        series = _SERIES.match(line)
        if series is None:
            continue
        name, value = series[1], float(series[3])
        labels = {key: re.sub(r"\\(.)", r"\1", escaped) for key, escaped in _LABEL.findall(series[2])}
        endpoint = endpoints.setdefault(labels["endpoint"], PoolEndpoint(labels["endpoint"]))
        if name != "state":
            endpoint.numbers[name] = int(value) if name in SHOWN else value
        elif value:
            endpoint.state = labels["state"]
    if not endpoints:
        raise ConfigError(f"{url} has no pool of endpoints", hint="qvl-serve openai:NAME --base-url … has one")
    return list(endpoints.values())


def pool_table(pool: Sequence[PoolEndpoint]) -> Table:
    """Return a table with a row per endpoint of a running server, weight and limit below its name."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.tables import seconds

    # No lines between the columns, and headings of short words: all of it fits in a terminal of 80.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("endpoint", no_wrap=True, overflow="fold")
    table.add_column("state")
    for heading in ("running", "picture tokens", "asked", "failed", "first token"):
        table.add_column(heading, justify="right")
    for endpoint in pool:
        numbers = endpoint.numbers
        usual = (("weight", numbers.get("weight", 1.0), 1.0), ("limit", numbers.get("limit"), None))
        unusual = " ".join(f"{name}={value:g}" for name, value, default in usual if value != default)
        rest = numbers.get("rest_seconds", 0.0)
        state = f"{endpoint.state}\n{seconds(rest)}" if rest else endpoint.state
        table.add_row(
            Text(endpoint.url).append(f"\n{unusual}" if unusual else "", style="dim"),
            Text(state, _BAD_STATES.get(endpoint.state, "green")),
            *(str(numbers.get(name, "")) for name in SHOWN),
            seconds(numbers.get("first_token_seconds", 0.0)),
        )
    return table


def _examine(listed: Sequence[Listed], model: str, timeout: float, *, verify: bool, as_json: bool) -> bool:
    import asyncio
    import os

    from qvl.backends.openai.inspect_endpoint import examine

    key = os.environ.get("QVL_API_KEY")
    examined = asyncio.run(examine(listed, model=model, api_key=key, timeout=timeout, verify=verify))
    if as_json:
        print_json({"endpoints": [_examined_json(endpoint) for endpoint in examined]})
    else:
        from qvl.cli.console import stdout

        stdout().print(examined_table(examined))
    return all(endpoint.error is None for endpoint in examined)


def _examined_json(endpoint: Examined) -> dict[str, object]:
    from qvl.backends.replay import capabilities_to_json

    have = endpoint.capabilities
    return {
        "url": endpoint.url,
        "reachable": endpoint.reachable,
        "models": list(endpoint.models),
        "model": endpoint.model or None,
        "capabilities": None if have is None else capabilities_to_json(have),
        "models_seconds": round(endpoint.models_seconds, 6),
        "first_token_seconds": round(endpoint.first_token_seconds, 6),
        "error": endpoint.error,
    }


def examined_table(examined: Sequence[Examined]) -> Table:
    """Return a table with a section per endpoint: its name, then a line per tested property."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.tables import seconds

    table = Table(box=SIMPLE_HEAD, show_edge=False, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for endpoint in examined:
        table.add_row("endpoint", Text(endpoint.url, style="green" if endpoint.reachable else "red"))
        facts = [("error", endpoint.error or ""), ("models", ", ".join(endpoint.models))]
        if (have := endpoint.capabilities) is not None:
            shown = (("pictures", have.images), ("videos", have.videos), ("tools", have.tools))
            features = [name for name, supported in shown if supported]
            facts += [
                ("context", str(have.max_context or "")),
                ("can do", ", ".join([*features, *sorted(have.response_formats)])),
                ("parameters", ", ".join(sorted(have.sampling))),
            ]
        times = (("list of models", endpoint.models_seconds), ("first token", endpoint.first_token_seconds))
        facts += [(name, seconds(value)) for name, value in times if value]
        for name, text in facts:
            if text:
                table.add_row(Text(name, style="dim"), Text(text, style="red" if name == "error" else ""))
        table.add_section()
    return table
