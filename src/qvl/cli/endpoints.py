"""`qvl endpoints`: the pool of a running server as it stands, or endpoints examined one by one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qvl.cli import options as o
from qvl.cli.terminal import json_line
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


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("endpoints")(endpoints)


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
    as_json: o.JsonOnly = False,
) -> None:
    """The endpoints behind a server (--url), or what endpoints are and can do (--base-url).

    The key comes from QVL_API_KEY, for endpoints else from OPENAI_API_KEY. Examining costs each endpoint about a dozen
    requests of a few tokens. Exit code 1 when an endpoint cannot be asked.
    """
    o.start_logs(verbose=False)
    if bool(url) == bool(base_url or base_url_file):
        raise ConfigError(
            "name a server or endpoints", hint="--url http://host:8000, or --base-url http://host:8000/v1"
        )
    if url:
        well = _watch(url, watch, timeout=timeout, verify=not insecure, as_json=as_json)
    elif watch is not None:
        raise ConfigError("--watch is for a running server", hint="--url http://host:8000")
    else:
        well = _examine(_listed(base_url, base_url_file), model, timeout, verify=not insecure, as_json=as_json)
    if not well:
        raise typer.Exit(1)


def _listed(urls: Sequence[str] | None, file: str | None) -> list[Listed]:
    from qvl.backends.openai.endpoint_list import Listed, by_name, read_endpoint_list

    return list(by_name([*(Listed(url) for url in urls or ()), *(read_endpoint_list(file) if file else ())]).values())


def _watch(url: str, every: float | None, *, timeout: float, verify: bool, as_json: bool) -> bool:
    def read() -> list[dict[str, Any]]:
        return read_metrics(_fetch(url, timeout, verify), url)

    if every is None:
        found = read()
        _print(found, pool_table, as_json=as_json, server=url)
    elif as_json:
        while True:
            found = read()
            _print(found, pool_table, as_json=True, server=url)
            time.sleep(every)
    else:
        from rich.live import Live

        from qvl.cli.tables import stdout

        found = read()
        with Live(pool_table(found), console=stdout(), auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(pool_table(read()), refresh=True)
    return all(one["state"] != "resting" for one in found)


def _fetch(url: str, timeout: float, verify: bool) -> str:
    """The metrics of the server at `url`.

    Raises:
        ConfigError: no URL of a server.
        AuthError: it wants another key.
        BackendUnavailableError: it does not answer.
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
        raise ConfigError(f"{url!r} is not the address of a server", hint="such as http://host:8000") from exc
    except httpx.HTTPError as exc:
        raise BackendUnavailableError(f"{base} does not answer: {exc or type(exc).__name__}") from exc
    if answer.status_code in (401, 403):
        raise AuthError(f"{base} does not accept the key", hint="set QVL_API_KEY")
    if answer.status_code != 200:
        raise BackendUnavailableError(f"{base}/metrics answered {answer.status_code}", hint="is it qvl-serve?")
    return answer.text


def read_metrics(text: str, url: str) -> list[dict[str, Any]]:
    """The endpoints in Prometheus' text format, one dictionary for each.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        series = _SERIES.match(line)
        if series is None:
            continue
        name, value = series[1], float(series[3])
        labels = {key: re.sub(r"\\(.)", r"\1", told) for key, told in _LABEL.findall(series[2])}
        one = found.setdefault(labels["endpoint"], {"url": labels["endpoint"], "state": "unknown"})
        if name != "state":
            one[name] = int(value) if name in SHOWN else value
        elif value:
            one["state"] = labels["state"]
    if not found:
        raise ConfigError(f"{url} has no pool of endpoints", hint="qvl-serve openai:NAME --base-url … has one")
    return list(found.values())


def pool_table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each endpoint of a running server; weight and limit stand under its name, as in a list of endpoints."""
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
    for one in found:
        known = (("weight", one.get("weight", 1.0), 1.0), ("limit", one.get("limit"), None))
        told = " ".join(f"{name}={value:g}" for name, value, usual in known if value != usual)
        rest = one.get("rest_seconds", 0.0)
        table.add_row(
            Text(one["url"]).append(f"\n{told}" if told else "", style="dim"),
            Text(f"{one['state']}\n{seconds(rest)}" if rest else one["state"], _BAD_STATES.get(one["state"], "green")),
            *(str(one.get(name, "")) for name in SHOWN),
            seconds(one.get("first_token_seconds", 0.0)),
        )
    return table


def _examine(listed: Sequence[Listed], model: str, timeout: float, *, verify: bool, as_json: bool) -> bool:
    import asyncio
    import os

    from qvl.backends.openai.inspect_endpoint import examine

    key = os.environ.get("QVL_API_KEY")
    found = asyncio.run(examine(listed, model=model, api_key=key, timeout=timeout, verify=verify))
    _print([_told(one) for one in found], examined_table, as_json=as_json)
    return all(one.error is None for one in found)


def _told(one: Examined) -> dict[str, Any]:
    from qvl.backends.replay import capabilities_to_json

    return {
        "url": one.url,
        "reachable": one.reachable,
        "models": list(one.models),
        "model": one.model or None,
        "capabilities": None if one.capabilities is None else capabilities_to_json(one.capabilities),
        "models_seconds": round(one.models_seconds, 6),
        "first_token_seconds": round(one.first_token_seconds, 6),
        "error": one.error,
    }


def examined_table(found: Sequence[dict[str, Any]]) -> Table:
    """A section for each endpoint that was examined: a line for its name and one for each thing that is known of it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.tables import seconds

    table = Table(box=SIMPLE_HEAD, show_edge=False, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in found:
        have = one["capabilities"] or {}
        can = [name for name, there in (("pictures", have.get("images")), ("tools", have.get("tools"))) if there]
        table.add_row("endpoint", Text(one["url"], style="green" if one["reachable"] else "red"))
        facts = (
            ("error", one["error"] or ""),
            ("models", ", ".join(one["models"])),
            ("context", str(have.get("max_context") or "")),
            ("can do", ", ".join([*can, *have.get("response_formats", ())])),
            ("parameters", ", ".join(have.get("sampling", ()))),
            ("list of models", seconds(one["models_seconds"]) if one["models_seconds"] else ""),
            ("first token", seconds(one["first_token_seconds"]) if one["first_token_seconds"] else ""),
        )
        for name, told in facts:
            if told:
                table.add_row(Text(name, style="dim"), Text(told, style="red" if name == "error" else ""))
        table.add_section()
    return table


def _print(
    found: Sequence[dict[str, Any]],
    table: Callable[[Sequence[dict[str, Any]]], Table],
    *,
    as_json: bool,
    server: str = "",
) -> None:
    if as_json:
        typer.echo(json_line({**({"server": server} if server else {}), "endpoints": list(found)}))
        return
    from qvl.cli.tables import stdout

    stdout().print(table(found))


__all__ = ["register"]
