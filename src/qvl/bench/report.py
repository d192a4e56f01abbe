"""The figures of a run as tables: for the terminal, and as rows for the HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, TypedDict

from qvl.bench.apis import find_api
from qvl.bench.metrics import Figures
from qvl.bench.pairs import AgreementSummary, PairSummary, welch
from qvl.bench.record import EndpointName
from qvl.bench.summary import EndpointSummary, SummaryData, SweepLevel, target_of

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
COLUMNS: Final[tuple[Literal["mean", "p50", "p90", "p95", "p99"], ...]] = ("mean", "p50", "p90", "p95", "p99")
FORMULA: Final = "TPOT = (E2E - TTFT) / (completion tokens - 1); TTFT and E2E count from the intended start; ms"


class ComparisonRow(TypedDict):
    """One figure of two runs; `interval` is the 95 % confidence interval of the difference."""

    endpoint: int
    name: str
    old: float
    new: float
    change: float | None
    interval: list[float] | None


def milliseconds(seconds: float | None) -> str:
    """Return a time as text in milliseconds, without the unit."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def figure_rows(endpoint: EndpointSummary) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows (name, cells) of one endpoint's latency table, with rows for hits, misses and retries."""
    groups: list[tuple[str, Figures]] = [("", endpoint["figures"])]
    states = endpoint["cache"]["figures"]
    if "hit" in states:
        groups += [(f", cache {state}", states[state]) for state in ("hit", "miss") if state in states]
    if endpoint["retries"]["requests"]:
        groups.append((", retried", endpoint["retries"]["figures"]))
    for after, figures in groups:
        for name, stats in figures.items():
            if stats:
                yield LABELS[name] + after, [milliseconds(stats[column]) for column in COLUMNS]


def facts(endpoint: EndpointSummary, target: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the figures of one endpoint that are not latencies; `target` names the API."""
    requests, rates, pictures = endpoint["requests"], endpoint["throughput"], endpoint["pictures"]
    share = requests["success_rate"]
    yield (
        "requests",
        f"{requests['sent']} sent, {requests['ok']} answered ({share:.1%})" if share is not None else "none",
    )
    if endpoint["errors"]:
        yield "errors", ", ".join(f"{kind} {count}" for kind, count in endpoint["errors"].items())
    retries = endpoint["retries"]
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
    if endpoint["goodput"]:
        bounds = ", ".join(f"{name} {milliseconds(bound)} ms" for name, bound in endpoint["goodput"]["slo"].items())
        rate = rates["goodput_requests_per_second"]
        yield "goodput", f"{endpoint['goodput']['share'] or 0:.1%} within {bounds}; {rate or 0:,.2f} requests/s"
    tokens = endpoint["tokens"]
    if tokens["prompt"] and tokens["completion"]:
        yield (
            "tokens",
            f"{tokens['prompt']['mean']:,.1f} in, {tokens['completion']['mean']:,.1f} out a request, counted by "
            f"{tokens['counted_by']}; {tokens['cached']:,} prompt tokens were cached",
        )
    counted = f"{pictures['image_tokens']:,} picture tokens counted"
    if not find_api(target).counts_pictures:
        counted = f"whose tokens {target} does not count apart"
    yield "pictures", f"{pictures['requests']} requests with pictures, {counted}"
    if endpoint["cache"]["states"]:
        yield "cache", ", ".join(f"{state} {count}" for state, count in endpoint["cache"]["states"].items())
    if endpoint["expected"]:
        yield "expected", agreement(endpoint["expected"])
    if endpoint["warmup"]["sent"]:
        yield "warm-up", f"{endpoint['warmup']['sent']} sent, {endpoint['warmup']['ok']} answered (not in any figure)"


def agreement(shares: AgreementSummary) -> str:
    """Return the shares of equal answers as one line."""
    fields = ", ".join(f"{name} {field['same'] / field['of']:.1%}" for name, field in shares["fields"].items())
    return f"{shares['exact']:.1%} the same of {shares['compared']}" + (f"; by field: {fields}" if fields else "")


def show(data: SummaryData, console: Console) -> None:
    """Print the figures of a run."""
    from rich.markup import escape
    from rich.table import Table

    target = target_of(data["asked"])
    for endpoint in data["endpoints"]:
        clients = f", {endpoint['clients']} clients" if endpoint["clients"] else ""
        title = f"{endpoint['url']} · {target} · {endpoint['model']}{clients}"
        table = Table(title=escape(title), title_justify="left")
        table.add_column("ms")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for name, cells in figure_rows(endpoint):
            table.add_row(name, *cells)
        console.print(table)
        for name, text in facts(endpoint, target):
            console.print(f"{name:>12}  {escape(text)}", highlight=False)
        for kind, text in endpoint["error_examples"].items():
            console.print(f"{'':>12}  {escape(f'{kind}: {text}')}", highlight=False, style="red")
    for number, rows in enumerate(data.get("sweep", ())):
        _show_sweep(rows, data["knees"][number], data["asked"]["endpoints"][number]["url"], console)
    for pair in data["paired"]:
        _show_pair(pair, data["asked"]["endpoints"], console)
    console.print(FORMULA, style="dim")
    for text in data["warnings"]:
        console.print(f"warning: {escape(text)}", style="bold yellow", highlight=False)
    if data["interrupted"]:
        console.print("interrupted: the figures are of the finished requests", style="yellow")


def _show_sweep(rows: list[SweepLevel], knee: int | None, url: str, console: Console) -> None:
    from rich.table import Table

    table = Table(title=f"sweep of {url}", title_justify="left")
    for column in ("clients", "requests/s", "tokens/s", "TTFT p50", "E2E p50", "E2E p99", ""):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["clients"]),
            f"{row['requests_per_second'] or 0:,.2f}",
            f"{row['completion_tokens_per_second'] or 0:,.1f}",
            *(milliseconds(seconds) for seconds in (row["ttft_p50"], row["e2e_p50"], row["e2e_p99"])),
            "knee" if row["clients"] == knee else "",
        )
    console.print(table)


def _show_pair(pair: PairSummary, endpoints: list[EndpointName], console: Console) -> None:
    from rich.table import Table

    first, other = endpoints[pair["against"]]["url"], endpoints[pair["endpoint"]]["url"]
    table = Table(title=f"{other} minus {first}, request by request", title_justify="left")
    for column in ("ms", "mean", "95 % interval", "median", "pairs"):
        table.add_column(column, justify="right")
    for name, gap in pair["differences"].items():
        if gap:
            spread = f"{milliseconds(gap['low'])} to {milliseconds(gap['high'])}"
            table.add_row(LABELS[name], milliseconds(gap["mean"]), spread, milliseconds(gap["median"]), str(gap["n"]))
    console.print(table)
    if pair["answers"]:
        console.print(f"{'answers':>12}  {agreement(pair['answers'])}", highlight=False)


def compare(old: SummaryData, new: SummaryData) -> list[ComparisonRow]:
    """Return a row per endpoint and figure: old, new, change, and the 95 % interval of the difference of means."""
    rows: list[ComparisonRow] = []
    for number, (before, after) in enumerate(zip(old["endpoints"], new["endpoints"], strict=False)):
        for name, label in LABELS.items():
            a, b = before["figures"].get(name), after["figures"].get(name)
            if a and b:
                rows.append(_row(number, f"{label} mean, ms", a["mean"] * 1000, b["mean"] * 1000))
                reach = welch(a, b)
                rows[-1]["interval"] = reach and [round(bound * 1000, 4) for bound in reach]
                rows.append(_row(number, f"{label} p50, ms", a["p50"] * 1000, b["p50"] * 1000))
                rows.append(_row(number, f"{label} p99, ms", a["p99"] * 1000, b["p99"] * 1000))
        shares = before["requests"]["success_rate"], after["requests"]["success_rate"]
        for name, x, y in (*_rates(before, after), ("success rate", *shares)):
            if x is not None and y is not None:
                rows.append(_row(number, name, x, y))
    return rows


def _rates(before: EndpointSummary, after: EndpointSummary) -> Iterator[tuple[str, float | None, float | None]]:
    a, b = before["throughput"], after["throughput"]
    yield "requests/s", a["requests_per_second"], b["requests_per_second"]
    yield "completion tokens/s", a["completion_tokens_per_second"], b["completion_tokens_per_second"]
    yield "prompt tokens/s", a["prompt_tokens_per_second"], b["prompt_tokens_per_second"]
    yield "goodput requests/s", a["goodput_requests_per_second"], b["goodput_requests_per_second"]


def _row(endpoint: int, name: str, old: float, new: float) -> ComparisonRow:
    change = (new - old) / old if old else None
    return {"endpoint": endpoint, "name": name, "old": old, "new": new, "change": change, "interval": None}


def show_comparison(rows: list[ComparisonRow], console: Console) -> None:
    """Print the rows of `compare` as a table."""
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
