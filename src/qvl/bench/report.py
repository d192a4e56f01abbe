"""Figures as tables: in the terminal, and as rows for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from qvl.bench.pairs import welch

if TYPE_CHECKING:
    from rich.console import Console

LABELS: Final = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "inter-token",
    "e2e": "E2E",
    "first_byte": "headers",
    "queue": "server queue",
    "network": "network",
    "client_wait": "wait to send",
}
COLUMNS: Final = ("mean", "p50", "p90", "p95", "p99")
RATES: Final = (
    "requests_per_second",
    "completion_tokens_per_second",
    "prompt_tokens_per_second",
    "goodput_requests_per_second",
)
FORMULA: Final = "TPOT = (E2E - TTFT) / (completion tokens - 1); TTFT and E2E count from the intended start; ms"


def milliseconds(seconds: float | None) -> str:
    """For people, without a unit."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def figure_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(name, cells) of the latency table of one endpoint; hits, misses and retried ones apart where there are any."""
    groups: list[tuple[str, Mapping[str, Any]]] = [("", found["figures"])]
    states = found["cache"]["figures"]
    if "hit" in states:
        groups += [(f", cache {state}", states[state]) for state in ("hit", "miss") if state in states]
    if found["retries"]["requests"]:
        groups.append((", retried", found["retries"]["figures"]))
    for after, figures in groups:
        for name, stats in figures.items():
            if stats:
                yield LABELS[name] + after, [milliseconds(stats[column]) for column in COLUMNS]


def facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of everything about one endpoint that is not a latency."""
    requests, rates, pictures = found["requests"], found["throughput"], found["pictures"]
    share = requests["success_rate"]
    yield (
        "requests",
        f"{requests['sent']} sent, {requests['ok']} answered ({share:.1%})" if share is not None else "none",
    )
    if found["errors"]:
        yield "errors", ", ".join(f"{kind} {count}" for kind, count in found["errors"].items())
    retries = found["retries"]
    if retries["requests"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in retries["by_kind"].items())
        yield "retries", f"{retries['retries']} for {retries['requests']} requests ({kinds})"
    part = "steady part" if rates["steady"] else "whole run"
    if rates["requests_per_second"] is not None:
        yield (
            "throughput",
            f"{rates['requests_per_second']:,.2f} requests/s, {rates['completion_tokens_per_second']:,.1f} tokens/s, "
            f"{rates['prompt_tokens_per_second']:,.1f} prompt tokens/s over {rates['steady_seconds']:,.1f} s ({part})",
        )
    if found["goodput"]:
        bounds = ", ".join(f"{name} {milliseconds(bound)} ms" for name, bound in found["goodput"]["slo"].items())
        rate = rates["goodput_requests_per_second"]
        yield "goodput", f"{found['goodput']['share'] or 0:.1%} within {bounds}; {rate or 0:,.2f} requests/s"
    tokens = found["tokens"]
    if tokens["prompt"]:
        yield (
            "tokens",
            f"{tokens['prompt']['mean']:,.1f} in, {tokens['completion']['mean']:,.1f} out a request, counted by "
            f"{tokens['counted_by']}; {tokens['cached']:,} prompt tokens were cached",
        )
    yield (
        "pictures",
        f"{pictures['requests']} requests with pictures, {pictures['image_tokens']:,} picture tokens counted",
    )
    if found["cache"]["states"]:
        yield "cache", ", ".join(f"{state} {count}" for state, count in found["cache"]["states"].items())
    if found.get("expected"):
        yield "expected", agreement(found["expected"])
    if found.get("warmup", {}).get("sent"):
        yield "warm-up", f"{found['warmup']['sent']} sent, {found['warmup']['ok']} answered (not in any figure)"


def agreement(found: Mapping[str, Any]) -> str:
    """How far answers agree, as a line."""
    fields = ", ".join(f"{name} {held['same'] / held['of']:.1%}" for name, held in found["fields"].items())
    return f"{found['exact']:.1%} the same of {found['compared']}" + (f"; by field: {fields}" if fields else "")


def show(data: Mapping[str, Any], console: Console) -> None:
    """Prints a run."""
    from rich.markup import escape
    from rich.table import Table

    for found in data["endpoints"]:
        clients = f", {found['clients']} clients" if found["clients"] else ""
        table = Table(title=escape(f"{found['url']} · {found['model']}{clients}"), title_justify="left")
        table.add_column("ms")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for name, cells in figure_rows(found):
            table.add_row(name, *cells)
        console.print(table)
        for name, text in facts(found):
            console.print(f"{name:>12}  {escape(text)}", highlight=False)
        for kind, text in found["error_examples"].items():
            console.print(f"{'':>12}  {escape(f'{kind}: {text}')}", highlight=False, style="red")
    for number, rows in enumerate(data.get("sweep") or ()):
        _show_sweep(rows, data["knees"][number], data["asked"]["endpoints"][number]["url"], console)
    for pair in data["paired"]:
        _show_pair(pair, data["asked"]["endpoints"], console)
    console.print(FORMULA, style="dim")
    for text in data["warnings"]:
        console.print(f"warning: {escape(text)}", style="bold yellow", highlight=False)
    if data["interrupted"]:
        console.print("interrupted: the figures are of what was done", style="yellow")


def _show_sweep(rows: list[dict[str, Any]], knee: int | None, url: str, console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"sweep of {url}", title_justify="left")
    for column in ("clients", "requests/s", "tokens/s", "TTFT p50", "E2E p50", "E2E p99", ""):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["clients"]),
            f"{row['requests_per_second'] or 0:,.2f}",
            f"{row['completion_tokens_per_second'] or 0:,.1f}",
            *(milliseconds(row[name]) for name in ("ttft_p50", "e2e_p50", "e2e_p99")),
            "knee" if row["clients"] == knee else "",
        )
    console.print(table)


def _show_pair(pair: Mapping[str, Any], endpoints: list[Mapping[str, str]], console: Console) -> None:
    from rich.table import Table

    first, other = endpoints[pair["against"]]["url"], endpoints[pair["endpoint"]]["url"]
    table = Table(title=f"{other} minus {first}, request by request", title_justify="left")
    for column in ("ms", "mean", "95 % interval", "median", "pairs"):
        table.add_column(column, justify="right")
    for name, found in pair["differences"].items():
        if found:
            spread = f"{milliseconds(found['low'])} to {milliseconds(found['high'])}"
            table.add_row(
                LABELS[name], milliseconds(found["mean"]), spread, milliseconds(found["median"]), str(found["n"])
            )
    console.print(table)
    if pair["answers"]:
        console.print(f"{'answers':>12}  {agreement(pair['answers'])}", highlight=False)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two runs, endpoint by endpoint: old, new, change, and a 95 % interval for the difference of each mean."""
    rows: list[dict[str, Any]] = []
    for number, (before, after) in enumerate(zip(old["endpoints"], new["endpoints"], strict=False)):
        for name, label in LABELS.items():
            left, right = before["figures"].get(name), after["figures"].get(name)
            if left and right:
                rows.append(_row(number, f"{label} mean, ms", left["mean"] * 1000, right["mean"] * 1000))
                reach = welch(left, right)
                rows[-1]["interval"] = reach and [round(reach["low"] * 1000, 4), round(reach["high"] * 1000, 4)]
                for mark in ("p50", "p99"):
                    rows.append(_row(number, f"{label} {mark}, ms", left[mark] * 1000, right[mark] * 1000))
        for name in RATES:
            left, right = before["throughput"][name], after["throughput"][name]
            if left is not None and right is not None:
                rows.append(_row(number, name.replace("_per_second", "/s").replace("_", " "), left, right))
        left, right = before["requests"]["success_rate"], after["requests"]["success_rate"]
        if left is not None and right is not None:
            rows.append(_row(number, "success rate", left, right))
    return rows


def _row(endpoint: int, name: str, old: float, new: float) -> dict[str, Any]:
    change = (new - old) / old if old else None
    return {"endpoint": endpoint, "name": name, "old": old, "new": new, "change": change, "interval": None}


def show_comparison(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints what `compare` found."""
    from rich.table import Table

    table = Table()
    for column in ("figure", "a", "b", "change", "95 % interval of b - a"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    several = any(row["endpoint"] for row in rows)
    for row in rows:
        change = "-" if row["change"] is None else f"{row['change']:+.1%}"
        spread = f"{row['interval'][0]:,.2f} to {row['interval'][1]:,.2f}" if row["interval"] else ""
        name = f"{row['endpoint']}: {row['name']}" if several else row["name"]
        table.add_row(name, f"{row['old']:,.3f}", f"{row['new']:,.3f}", change, spread)
    console.print(table)
