"""The HTML report: tables and plots in one self-contained file."""

from __future__ import annotations

import io
import re
import warnings
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.bench import report
from qvl.bench.apis import find_api
from qvl.bench.pairs import PairSummary
from qvl.bench.record import EndpointName, RunRequest, write_text
from qvl.bench.summary import EndpointSummary, Points, Summary, target_of
from qvl.errors import MissingDependencyError
from qvl.html.page import page_html
from qvl.suggest import install_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST: Final = 8
"""Requests of a plot; fewer say less than the table."""
FEWEST_STEPS: Final = 3
"""Levels of load, or seconds, along an axis; two are no curve."""


def write(summary: Summary, path: Path) -> None:
    """Write the page to `path` atomically.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written.
    """
    write_text(path, html(summary))


def html(summary: Summary) -> str:
    """Return the page as HTML."""
    data = summary.data
    target = target_of(data["asked"])
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f'<p class="warning">{escape(text)}</p>' for text in data["warnings"]]
    if data["interrupted"]:
        parts.append('<p class="warning">interrupted: the figures are of the finished requests</p>')
    parts += [_endpoint(endpoint, target) for endpoint in data["endpoints"]]
    parts += [_pair(pair, data["asked"]["endpoints"]) for pair in data["paired"]]
    for name, drawn in plots(summary).items():
        parts.append(f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>")
    formulas = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in data["formulas"].items()
    )
    head = f'<h1>qvl bench</h1><p class="facts">{at} · {escape(target)}: /v1{escape(find_api(target).path)}</p>'
    parts.append(_parameters(data["asked"]))
    parts.append(f"<h2>What the figures are</h2><table>{formulas}</table>")
    return page_html("qvl bench", "\n".join([head, *parts]))


def _parameters(asked: RunRequest) -> str:
    """Return the parameters of the run as a table: endpoints, input, load, and fields of every request."""
    rows = [("endpoint", f"{endpoint['url']} · {endpoint['model']}") for endpoint in asked["endpoints"]]
    rows += [("target", target_of(asked)), *((name, str(value)) for name, value in asked["input"].items())]
    rows += [(name, str(value)) for name, value in asked["plan"].items() if value not in (None, False, {}, 0)]
    rows += [("stream", str(asked["stream"])), *((name, str(value)) for name, value in asked["params"].items())]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value[:500])}</td></tr>" for name, value in rows)
    return f"<h2>Parameters of the run</h2><table>{cells}</table>"


def _endpoint(endpoint: EndpointSummary, target: str) -> str:
    clients = f", {endpoint['clients']} clients" if endpoint["clients"] else ""
    head = "".join(f"<th>{column}</th>" for column in report.COLUMNS)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"
        for name, cells in report.figure_rows(endpoint)
    )
    facts = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in report.facts(endpoint, target)
    )
    errors = "".join(
        f"<tr><th>{escape(kind)}</th><td>{escape(text)}</td></tr>" for kind, text in endpoint["error_examples"].items()
    )
    title = escape(f"{endpoint['url']} · {endpoint['model']}{clients}")
    return (
        f'<h2>{title}</h2><div class="wide"><table><tr><th>ms</th>{head}</tr>{rows}</table></div><table>{facts}</table>'
        + (f"<h3>Errors</h3><table>{errors}</table>" if errors else "")
    )


def _pair(pair: PairSummary, endpoints: list[EndpointName]) -> str:
    title = escape(f"{endpoints[pair['endpoint']]['url']} minus {endpoints[pair['against']]['url']}")
    rows = "".join(
        f"<tr><th>{report.LABELS[name]}</th>"
        + "".join(
            f'<td class="number">{report.milliseconds(seconds)}</td>'
            for seconds in (gap["mean"], gap["low"], gap["high"], gap["median"])
        )
        + f'<td class="number">{gap["n"]}</td></tr>'
        for name, gap in pair["differences"].items()
        if gap
    )
    head = "<tr><th>ms</th><th>mean</th><th>95 % from</th><th>to</th><th>median</th><th>pairs</th></tr>"
    answers = f"<p>answers: {escape(report.agreement(pair['answers']))}</p>" if pair["answers"] else ""
    return f"<h2>{title}</h2><table>{head}{rows}</table>{answers}"


def plots(summary: Summary) -> dict[str, str]:
    """Return the plots as SVG text by title.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ModuleNotFoundError as exc:
        raise MissingDependencyError("plots need the matplotlib package", hint=install_line("bench")) from exc
    names = [endpoint["url"] for endpoint in summary.data["asked"]["endpoints"]]
    levels = any(len(rows) >= FEWEST_STEPS for rows in summary.data.get("sweep", ()))
    gaps = any(len(values) >= FEWEST for values in summary.points.gaps.values())
    answered = sum(point[4] for point in summary.points.kept)
    drawn = {}
    if answered >= FEWEST:
        drawn["Latency distribution"] = _latencies(_figure(3.4), summary.points, names)
    if gaps and answered >= FEWEST:
        drawn["Time between tokens"] = _between_tokens(_figure(3.0), summary.points, names)
    if levels:
        drawn["Latency against load"] = _against_load(_figure(3.4), summary, names)
        drawn["Distribution at each level"] = _levels(_figure(3.4), summary, names)
    if summary.points.count >= FEWEST:
        drawn["Timeline"] = _timeline(_figure(4.4), summary.points)
    if levels or len(summary.points.seconds) >= FEWEST:
        drawn["Throughput against concurrency"] = _throughput(_figure(3.4), summary, names)
    return {title: svg(figure) for title, figure in drawn.items()}


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), layout="constrained")


def _between_tokens(figure: Figure, points: Points, names: list[str]) -> Figure:
    axis = figure.subplots()
    for number, values in sorted(points.gaps.items()):
        milliseconds = [1000 * gap for gap in values]
        axis.hist(milliseconds, bins=50, histtype="step", density=True, label=names[number])
    axis.set(xlabel="time between two pieces of an answer, ms", ylabel="density")
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize="small")
    return figure


def _against_load(figure: Figure, summary: Summary, names: list[str]) -> Figure:
    """Plot TTFT and E2E of each level of a sweep against its throughput: where more load only makes answers late."""
    axes = figure.subplots(1, 2)
    for number, rows in enumerate(summary.data["sweep"]):
        rates = [row["requests_per_second"] or 0 for row in rows]
        for axis, lines in ((axes[0], ("ttft_p50",)), (axes[1], ("e2e_p50", "e2e_p99"))):
            for name in lines:
                values = [row[name] or float("nan") for row in rows]  # type: ignore[literal-required]
                label = f"{names[number]} {name[-3:]}" if len(names) > 1 else name[-3:]
                axis.plot(rates, values, marker="o", label=label)
        for row, rate in zip(rows, rates, strict=True):
            place = (rate, row["e2e_p50"] or 0)
            axes[1].annotate(str(row["clients"]), place, (3, 4), textcoords="offset points", fontsize="x-small")
    for axis, name in ((axes[0], "TTFT, s"), (axes[1], "E2E, s (numbers: clients)")):
        axis.set(xlabel="requests a second", ylabel=name, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def _levels(figure: Figure, summary: Summary, names: list[str]) -> Figure:
    """Plot the E2E latencies of each level of a sweep, from p50 to p99."""
    axis = figure.subplots()
    groups = [group for group in summary.data["all"] if group["figures"]["e2e"]]
    places = sorted({group["clients"] or 0 for group in groups})
    for number, name in enumerate(names):
        urls = [group for group in groups if group["url"] == name]
        for group in urls:
            stats = group["figures"]["e2e"]
            assert stats is not None
            at = places.index(group["clients"] or 0) + 0.15 * number
            axis.vlines(at, stats["p50"], stats["p99"], color=f"C{number}", linewidth=2, alpha=0.5)
            for column, mark in (("p50", "o"), ("p90", "_"), ("p99", "^")):
                axis.plot(at, stats[column], mark, color=f"C{number}")  # type: ignore[literal-required]
    axis.set_xticks(range(len(places)), [str(place) for place in places])
    axis.set(xlabel="clients", ylabel="E2E, s: p50, p90, p99", ylim=(0, None))
    axis.grid(alpha=0.3)
    return figure


def _latencies(figure: Figure, points: Points, names: list[str]) -> Figure:
    import numpy as np

    axes = figure.subplots(1, 2)
    for axis, is_ttft, title in ((axes[0], True, "TTFT"), (axes[1], False, "E2E")):
        for number, name in enumerate(names):
            answered = [point for point in points.kept if point[4] and point[5] == number]
            times = (point[2] if is_ttft else point[3] for point in answered)
            values = sorted(seconds for seconds in times if seconds is not None)
            if values:
                axis.plot(values, np.arange(1, len(values) + 1) / len(values), label=name, drawstyle="steps-post")
        axis.set(xlabel=f"{title}, s", ylabel="share of requests", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    if len(names) > 1:
        axes[0].legend(fontsize="small")
    return figure


def _timeline(figure: Figure, points: Points) -> Figure:
    """Plot each request by its start, and below, of longer runs, how many ended in each second."""
    seconds = sorted(points.seconds)
    upper, *lower = figure.subplots(1 + (len(seconds) >= FEWEST_STEPS), 1, sharex=True, squeeze=False)[:, 0]
    for ok, colour, label in ((True, "tab:blue", "answered"), (False, "tab:red", "failed")):
        kept = [point for point in points.kept if point[4] is ok]
        if kept:
            upper.scatter([p[0] for p in kept], [p[3] for p in kept], s=6, color=colour, label=label)
    upper.set(ylabel="E2E, s")
    if points.kept:
        upper.legend(fontsize="small")
    for axis in lower:
        bottom = [points.seconds[second][0] for second in seconds]
        failed = [points.seconds[second][1] for second in seconds]
        axis.bar(seconds, bottom, width=1.0, align="edge")
        axis.bar(seconds, failed, width=1.0, align="edge", bottom=bottom, color="tab:red")
        axis.set(ylabel="ended a second")
    (lower or [upper])[-1].set_xlabel("seconds")
    return figure


def _throughput(figure: Figure, summary: Summary, names: list[str]) -> Figure:
    """Plot throughput against concurrency: the levels of a sweep, else each second of the run by requests in flight."""
    axis = figure.subplots()
    levels = summary.data.get("sweep")
    if levels:
        for number, rows in enumerate(levels):
            axis.plot(
                [row["clients"] or 0 for row in rows],
                [row["requests_per_second"] or 0 for row in rows],
                marker="o",
                label=names[number],
            )
            knee = summary.data["knees"][number]
            if knee is not None:
                axis.axvline(knee, linestyle=":", color=f"C{number}")
        axis.set_xscale("log", base=2)
        clients = sorted({row["clients"] or 0 for rows in levels for row in rows})
        axis.set_xticks(clients, [str(number) for number in clients])
        axis.legend(fontsize="small")
        axis.set_xlabel("clients")
    else:
        scale = summary.points.count / max(1, len(summary.points.kept))
        in_flight: dict[int, float] = {}
        for start, end, *_ in summary.points.kept:
            for second in range(int(start), min(int(end), int(start) + 3600) + 1):
                overlap = max(0.0, min(end, second + 1) - max(start, second))
                in_flight[second] = in_flight.get(second, 0.0) + overlap * scale
        seconds = [second for second in sorted(in_flight) if second in summary.points.seconds]
        axis.scatter(
            [in_flight[second] for second in seconds], [summary.points.seconds[second][0] for second in seconds], s=12
        )
        axis.set_xlabel("mean in flight, each second of the run")
    axis.set_ylabel("answers a second")
    axis.grid(alpha=0.3)
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as SVG text that can stand in a page; equal figures give equal text."""
    import matplotlib as mpl

    for axis in figure.axes:
        legend = axis.get_legend()
        for text in (axis.title, *(() if legend is None else legend.get_texts())):
            # Names of runs and questions, whose "$" is no formula.
            text.set_parse_math(False)
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qvl"}), warnings.catch_warnings():
        # Text stays text, which the viewer's fonts have.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    # The colours of the page around it, by day and by night.
    drawn = out.getvalue().replace("#000000", "currentColor").replace("#ffffff", "var(--card)")
    return re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
