"""The page of a calibration: for each field how far its confidence can be believed, and what a threshold costs."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING

from qvl.bench.page import svg
from qvl.errors import MissingDependencyError
from qvl.evaluation.calibrate import Believed, CalibrationReport, FieldReport
from qvl.evaluation.measures import Interval, Kept
from qvl.html.page import page_html
from qvl.suggest import install_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 40
_COLUMNS = ("labels", "right", "ECE, raw", "ECE, calibrated", "Brier, raw", "Brier, calibrated", "curve")


def html(report: CalibrationReport) -> str:
    """Return the page as HTML.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = f"{at} · {report.model} · {report.answered} of {report.lines} labelled lines answered · {report.held_out}"
    parts = ["<h1>qvl calibrate</h1>", f'<p class="facts">{escape(facts)}</p>']
    parts += [
        f'<p class="warning">{escape(where)}: {escape(why)}</p>' for where, why in list(report.failed.items())[:20]
    ]
    rows = "".join(_row(one) for one in report.fields)
    head = "".join(f'<th class="number">{escape(title)}</th>' for title in _COLUMNS)
    parts.append(f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>')
    parts.append(
        '<p class="note">ECE: the mean distance between confidence and share of right answers, over ten bins of equal '
        "width. Brier: the mean squared distance of the confidence from what was the case. In brackets: where they lie "
        "with 95 %, by drawing pictures with replacement. Bars of the diagrams: 95 % (Wilson).</p>"
    )
    for one in report.fields:
        parts.append(f"<h2>{escape(one.name)}</h2>{_told(one, report.precision)}")
        parts.append(f"<figure>{svg(figure([one]))}</figure>")
    return page_html("qvl calibrate", "\n".join(parts))


def figure(fields: list[FieldReport]) -> Figure:
    """Return the plots of `fields`, a row each: the reliability diagram, and risk against coverage.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as exc:
        raise MissingDependencyError("plots need the matplotlib package", hint=install_line("calibrate")) from exc
    drawn = Figure(figsize=(9, 3.6 * len(fields)), layout="constrained")
    rows = drawn.subplots(len(fields), 2, squeeze=False)
    for (left, right), one in zip(rows, fields, strict=True):
        _reliability(left, one)
        _risk(right, one)
    return drawn


def _reliability(axis: Axes, one: FieldReport) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    for label, colour, marker, believed in (
        ("raw", "tab:orange", "s", one.raw),
        ("calibrated", "tab:blue", "o", one.calibrated),
    ):
        bins = believed.bins
        shares = [found.right for found in bins]
        below = [max(0.0, found.right - found.interval[0]) for found in bins]
        above = [max(0.0, found.interval[1] - found.right) for found in bins]
        sizes = [12 + 140 * found.count / one.labels for found in bins]
        sure = [found.confidence for found in bins]
        axis.errorbar(sure, shares, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
        text = f"{label}, ECE {believed.ece:.3f}"
        axis.scatter(sure, shares, s=sizes, color=colour, marker=marker, alpha=0.8, label=text, zorder=3)
    axis.set(xlabel="confidence", ylabel="share of right answers", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_title(f"{_short(one.name)}: reliability", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")


def _risk(axis: Axes, one: FieldReport) -> None:
    coverage = [kept.coverage for kept in one.coverage]
    axis.plot(coverage, [1 - kept.precision for kept in one.coverage], color="tab:blue", label="wrong among told")
    low, high = ([1 - kept.interval[side] for kept in one.coverage] for side in (1, 0))
    axis.fill_between(coverage, low, high, color="tab:blue", alpha=0.15, linewidth=0)
    for kept, colour, text in (
        (one.at_precision, "tab:green", "asked precision"),
        (one.at_threshold, "tab:red", "asked threshold"),
    ):
        if kept is not None:
            label = f"{text}: confidence from {kept.threshold:.3f}"
            axis.scatter([kept.coverage], [1 - kept.precision], color=colour, zorder=3, label=label)
    highest = max((1 - kept.precision for kept in one.coverage), default=0.0)
    axis.set(xlabel="coverage: share of answers told", ylabel="risk: share of wrong among them", xlim=(0, 1.02))
    axis.set_ylim(0, max(0.05, 1.4 * highest))
    axis.set_title(f"{_short(one.name)}: risk against coverage", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")


def _short(name: str) -> str:
    """Return a name that fits over a plot; a question may be long."""
    return name if len(name) <= _WIDE else f"{name[: _WIDE - 1]}…"


def _row(one: FieldReport) -> str:
    cells = [
        f"{one.labels}",
        f"{one.accuracy:.1%} {_percents(one.accuracy_interval)}",
        *(_error(believed, "ece") for believed in (one.raw, one.calibrated)),
        *(_error(believed, "brier") for believed in (one.raw, one.calibrated)),
        one.method or "",
    ]
    inner = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
    return f"<tr><th>{escape(one.name)}</th>{inner}</tr>"


def _error(believed: Believed, name: str) -> str:
    value, (low, high) = getattr(believed, name), getattr(believed, f"{name}_interval")
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _told(one: FieldReport, precision: float | None) -> str:
    lines = []
    if precision is not None:
        lines.append(f"for {precision:.0%}: {kept_text(one.at_precision)}")
    if one.at_threshold is not None:
        lines.append(kept_text(one.at_threshold))
    if one.unanswered:
        lines.append(f"{one.unanswered} labels for which the answer had no value, or no probability")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def kept_text(kept: Kept | None) -> str:
    """Return what a threshold tells as text; `kept` is None if no threshold reaches a precision."""
    if kept is None:
        return "no threshold is borne out by these labels"
    told = f"{kept.coverage:.1%} of {'answers' if kept.count else 'no answers'} told"
    right = f", {kept.precision:.1%} of them right {_percents(kept.interval)}" if kept.count else ""
    return f"confidence from {kept.threshold:.4g}: {told}{right}"


def _percents(interval: Interval) -> str:
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]"
