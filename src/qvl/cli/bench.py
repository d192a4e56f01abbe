"""`qvl bench`: load an endpoint and measure it; `qvl bench compare`: two runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from qvl.cli import failure
from qvl.cli.bench_options import BenchOptions
from qvl.cli.expand import expand
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError, MissingDependencyError, QvlError

if TYPE_CHECKING:
    from typer._click.core import Context

    from qvl.bench.record import RequestRecord
    from qvl.bench.run import Run
    from qvl.bench.summary import Summary, SummaryData
    from qvl.cli.console import PlainConsole


class _RunByDefault(TyperGroup):
    """A group that inserts `run` if the first argument is not a subcommand."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Load an endpoint and measure it: `qvl bench OPTIONS` is `qvl bench run OPTIONS`.",
)


def register(root: typer.Typer) -> None:
    """Add the group to `root`."""
    root.add_typer(app, name="bench")


@app.command()
@expand
def run(options: BenchOptions) -> None:
    """Load endpoints and measure them; `qvl bench compare A B` puts two runs side by side.

    Leaves results.jsonl, summary.json and report.html in a folder. Exit code: 0 done, 1 success below --min-success,
    2 wrong use, 130 after Ctrl-C.
    """
    from qvl.bench.run import Run

    plan, target, dataset = options.plan(), options.endpoints_asked(), options.dataset()
    if options.resume and options.out is None:
        raise ConfigError("--resume needs the folder of a run", hint="name it with --out")
    folder = options.out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    bench_run = Run(target, dataset, plan, folder, resume=options.resume)
    with _bar(bench_run, sys.stderr.isatty() if options.progress is None else options.progress) as on_record:
        bench_run.on_record = on_record
        summary = bench_run.work()
    _leave(summary, folder, options.html, options.as_json)
    if summary.data["interrupted"]:
        raise typer.Exit(130)
    if not any(endpoint["requests"]["sent"] for endpoint in summary.data["endpoints"]):
        raise QvlError("no requests were sent", hint="see --duration, --rate and --count, and that the input has lines")
    if summary.success_rate * 100 < options.min_success:
        least = f"--min-success is {options.min_success:g} %"
        text = f"error: {summary.success_rate:.1%} of the requests succeeded, {least}"
        failure.stderr().print(text, style="bold red")
        raise typer.Exit(failure.FAILED)


@app.command("compare")
def compare_runs(
    old: Annotated[Path, typer.Argument(metavar="A", help="summary.json of a run, or its folder.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The same of the other run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the figures of two runs side by side, with 95 % intervals for differences of means."""
    from qvl.bench import report

    rows = report.compare(_read_summary(old), _read_summary(new))
    if as_json:
        print_json({"rows": rows})
    else:
        report.show_comparison(rows, _console())


def _leave(summary: Summary, folder: Path, html: bool, as_json: bool) -> None:
    from qvl.bench import page, report
    from qvl.bench.record import REPORT

    if as_json:
        print_json(summary.data)
        for text in summary.data["warnings"]:
            failure.stderr().print(f"warning: {text}", style="bold yellow")
    else:
        report.show(summary.data, _console())
    if html:
        try:
            page.write(summary, folder / REPORT)
        except MissingDependencyError as exc:
            failure.stderr().print(f"no report.html: {exc}", style="yellow")
    failure.stderr().print(f"written: {folder}")


def _console() -> PlainConsole:
    from qvl.cli.console import PlainConsole

    return PlainConsole(soft_wrap=not sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 140)


def _read_summary(path: Path) -> SummaryData:
    from qvl.bench.record import SUMMARY

    file = path / SUMMARY if path.is_dir() else path
    try:
        summary: SummaryData = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read as a summary", hint="name a summary.json, or a run's folder") from exc
    if not isinstance(summary, dict) or summary.get("format") != "qvl-bench-1":
        raise ConfigError(f"{file} is not a qvl bench summary", hint="name a summary.json, or a run's folder")
    return summary


@contextmanager
def _bar(bench_run: Run, shown: bool) -> Iterator[Callable[[RequestRecord], None]]:
    """Show a progress bar on stderr (done, requests/s, tokens/s, failures, in flight); yield its callback."""
    if not shown:
        yield lambda record: None
        return
    from time import perf_counter

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[live]}"))
    began, drawn = perf_counter(), 0.0
    done = failed = tokens = 0
    with Progress(*columns, console=failure.stderr(), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("requests", total=bench_run.total(), live="")

        def on_record(record: RequestRecord) -> None:
            nonlocal drawn, done, failed, tokens
            if record.phase == "warmup":
                return
            done += 1
            failed += not record.success
            tokens += record.completion_tokens
            now = perf_counter()
            if now - drawn < 0.2:
                return
            drawn = now
            seconds = max(now - began, 1e-9)
            in_flight = bench_run.load.in_flight if bench_run.load else 0
            live = (
                f"{(done - failed) / seconds:,.1f} req/s · {tokens / seconds:,.0f} tok/s · "
                f"{failed} failed · {in_flight} in flight"
            )
            bar.update(task, completed=done, live=live)

        yield on_record
        bar.update(task, completed=done)
