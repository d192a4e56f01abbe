"""`qvl bench`: load an endpoint and measure it; `qvl bench compare`: two runs side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from qvl.cli import failure
from qvl.cli.parse_args import pairs
from qvl.cli.terminal import json_line
from qvl.errors import ConfigError, MissingDependencyError, QvlError, write_failed

if TYPE_CHECKING:
    from qvl.bench.dataset import Dataset
    from qvl.bench.plan import LoadPlan
    from qvl.bench.record import RequestRecord
    from qvl.bench.run import Run
    from qvl.bench.summary import Summary

_INPUT: Final = "What to ask"
_LOAD: Final = "How to load"
_OUTPUT: Final = "What to leave"


class _RunByDefault(TyperGroup):
    """`qvl bench ...` is `qvl bench run ...` unless another command is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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
def run(
    url: Annotated[list[str] | None, typer.Option(help="Base URL with /v1; several are compared.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the first that it lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=["QVL_API_KEY", "OPENAI_API_KEY"], help="Its key.")] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", metavar="NAME=VALUE", help="A further header.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="JSONL file or glob; may be repeated.", rich_help_panel=_INPUT),
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option("--picture", "-f", help="One request with this picture; repeat for more.", rich_help_panel=_INPUT),
    ] = None,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="So many different drawn pictures.", rich_help_panel=_INPUT)
    ] = None,
    size: Annotated[str, typer.Option(help="Of drawn pictures, WxH.", rich_help_panel=_INPUT)] = "512x512",
    prompt: Annotated[
        str, typer.Option(help="The question for pictures without one.", rich_help_panel=_INPUT)
    ] = "Describe it.",
    base_dir: Annotated[
        Path | None, typer.Option(help="Where relative picture paths start.", rich_help_panel=_INPUT)
    ] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line.", rich_help_panel=_INPUT)] = False,
    max_pixels: Annotated[
        int | None, typer.Option(min=1024, help="Budget of one picture.", rich_help_panel=_INPUT)
    ] = None,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Smaller pictures are made larger.", rich_help_panel=_INPUT)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, of every request.", rich_help_panel=_INPUT)
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME=VALUE", help="temperature=0 ...", rich_help_panel=_INPUT),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Ask for streams (TTFT needs them).", rich_help_panel=_INPUT)] = True,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", "-c", min=1, help="Clients; with --rate the most in flight.", rich_help_panel=_LOAD
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Open loop: requests/s, latency from the intended start.", rich_help_panel=_LOAD),
    ] = None,
    arrival: Annotated[str, typer.Option(help="poisson or constant.", rich_help_panel=_LOAD)] = "poisson",
    ramp: Annotated[float, typer.Option(help="Seconds until all clients run.", rich_help_panel=_LOAD)] = 0.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="1, 2, 4 ... clients until throughput stops growing.", rich_help_panel=_LOAD)
    ] = False,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="One more on success, half on overload.", rich_help_panel=_LOAD)
    ] = False,
    count: Annotated[int | None, typer.Option("--count", "-n", help="So many requests.", rich_help_panel=_LOAD)] = None,
    duration: Annotated[float | None, typer.Option(help="For so many seconds.", rich_help_panel=_LOAD)] = None,
    warmup: Annotated[int, typer.Option(help="Requests before, about other pictures.", rich_help_panel=_LOAD)] = 0,
    retries: Annotated[int, typer.Option(min=0, max=100, help="Most times to ask again.", rich_help_panel=_LOAD)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one attempt.", rich_help_panel=_LOAD)] = 600.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and drawn pictures.", rich_help_panel=_LOAD)] = 0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Take any TLS certificate.", rich_help_panel=_LOAD)
    ] = False,
    slo: Annotated[str, typer.Option(help="ttft=500ms,tpot=50ms,e2e=10s: goodput.", rich_help_panel=_OUTPUT)] = "",
    min_success: Annotated[
        float, typer.Option(help="Exit 1 below this share, in %.", min=0, max=100, rich_help_panel=_OUTPUT)
    ] = 90.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; default: a new one here.", rich_help_panel=_OUTPUT)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_OUTPUT)
    ] = False,
    html: Annotated[bool, typer.Option(help="Write report.html (needs matplotlib).", rich_help_panel=_OUTPUT)] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    progress: Annotated[
        bool | None, typer.Option(help="A bar with live rates; default: on a terminal.", rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Load endpoints and measure them; `qvl bench compare A B` puts two runs side by side.

    Leaves results.jsonl, summary.json and report.html in a folder. Exit code: 0 done, 1 success below --min-success,
    2 wrong use, 130 after Ctrl-C.
    """
    from qvl.backends.openai.retry import RetryPolicy
    from qvl.bench.plan import MOST_IN_FLIGHT, LoadPlan, read_slo
    from qvl.bench.run import Run, Target

    plan = LoadPlan(
        concurrency=concurrency or (MOST_IN_FLIGHT if rate else 64 if sweep or adaptive else 1),
        rate=rate,
        arrival=arrival,  # type: ignore[arg-type]
        ramp=ramp,
        adaptive=adaptive,
        sweep=sweep,
        count=count,
        duration=duration,
        warmup=warmup,
        retries=RetryPolicy(max_retries=retries),
        timeout=timeout,
        seed=seed,
        slo=read_slo(slo),
    )
    params = pairs(param or (), "--param")
    if max_tokens is not None:
        params["max_tokens"] = max_tokens
    headers = {name: str(value) for name, value in pairs(header or (), "--header").items()}
    target = Target(tuple(url or ()), model, api_key, headers, params, stream, max_pixels, min_pixels, not insecure)
    dataset = _dataset(data, picture, synthetic, size, prompt, base_dir, strict, seed)
    if resume and out is None:
        raise ConfigError("--resume goes on with a run in a folder", hint="name it with --out")
    folder = out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    bar = sys.stderr.isatty() if progress is None else progress
    work = Run(target, dataset, plan, folder, resume=resume)
    with _bar(work, plan, bar) as seen:
        work.on_record = seen
        summary = work.work()
    _leave(summary, folder, html, as_json)
    if summary.data["interrupted"]:
        raise typer.Exit(130)
    if not any(found["requests"]["sent"] for found in summary.data["endpoints"]):
        raise QvlError("nothing was sent", hint="see --duration, --rate and --count, and that the input has lines")
    if summary.success_rate * 100 < min_success:
        text = f"error: {summary.success_rate:.1%} of the requests succeeded, --min-success is {min_success:g} %"
        failure.stderr().print(text, style="bold red")
        raise typer.Exit(failure.FAILED)


@app.command("compare")
def compare_runs(
    old: Annotated[Path, typer.Argument(metavar="A", help="summary.json of a run, or its folder.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The same of the other run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put the figures of two runs side by side, with 95 % intervals for differences of means."""
    from qvl.bench import report

    rows = report.compare(_read_summary(old), _read_summary(new))
    if as_json:
        typer.echo(json_line({"rows": rows}))
    else:
        report.show_comparison(rows, _console())


def _dataset(
    data: list[str] | None,
    picture: list[str] | None,
    synthetic: int | None,
    size: str,
    prompt: str,
    base_dir: Path | None,
    strict: bool,
    seed: int,
) -> Dataset:
    from qvl.bench.dataset import Drawn, Files, NamedRequest

    if sum(map(bool, (data, picture, synthetic))) != 1:
        raise ConfigError("name what to ask, in one way", hint="--data FILE.jsonl, -f PICTURE, or --synthetic N")
    if data:
        err = failure.stderr()
        return Files(
            data,
            base_dir=base_dir,
            prompt=prompt,
            strict=strict,
            on_bad=lambda bad: err.print(f"skipped {bad}", style="yellow"),
        )
    if picture:
        return NamedRequest(picture, prompt)
    width, _, height = size.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and 32 <= int(width) <= 8192 and 32 <= int(height) <= 8192):
        raise ConfigError(f"invalid --size {size}", hint="as 1024x768, each side from 32 to 8192")
    assert synthetic is not None
    return Drawn(synthetic, (int(width), int(height)), prompt=prompt, first_seed=seed * 1_000_000)


def _leave(summary: Summary, folder: Path, html: bool, as_json: bool) -> None:
    from qvl.bench import page, report
    from qvl.bench.record import REPORT

    if as_json:
        typer.echo(json_line(summary.data))
    else:
        report.show(summary.data, _console())
    if as_json:
        for text in summary.data["warnings"]:
            failure.stderr().print(f"warning: {text}", style="bold yellow")
    if html:
        try:
            try:
                page.write(summary, folder / REPORT)
            except OSError as exc:
                raise write_failed(str(folder / REPORT), exc) from exc
        except MissingDependencyError as exc:
            failure.stderr().print(f"no report.html: {exc}", style="yellow")
    failure.stderr().print(f"written: {folder}")


def _console() -> Any:
    from qvl.cli.console import PlainConsole

    return PlainConsole(soft_wrap=not sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 140)


def _read_summary(path: Path) -> dict[str, Any]:
    from qvl.bench.record import SUMMARY

    file = path / SUMMARY if path.is_dir() else path
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read as a summary", hint="name a summary.json, or a run's folder") from exc
    if not isinstance(held, dict) or held.get("format") != "qvl-bench-1":
        raise ConfigError(f"{file} is not a summary of qvl bench", hint="name a summary.json, or a run's folder")
    return held


@contextmanager
def _bar(work: Run, plan: LoadPlan, wanted: bool) -> Iterator[Callable[[RequestRecord], None]]:
    """A progress bar on stderr: done, requests/s, tokens/s, failures, in flight."""
    if not wanted:
        yield lambda record: None
        return
    from time import perf_counter

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[live]}"))
    began = perf_counter()
    held = {"done": 0, "failed": 0, "tokens": 0}
    shown = [0.0]
    with Progress(*columns, console=failure.stderr(), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("requests", total=work.total(), live="")

        def seen(record: RequestRecord) -> None:
            if record.phase == "warmup":
                return
            held["done"] += 1
            held["failed"] += not record.success
            held["tokens"] += record.completion_tokens
            now = perf_counter()
            if now - shown[0] < 0.2:
                return
            shown[0] = now
            past = max(now - began, 1e-9)
            flying = work.load.in_flight if work.load else 0
            live = (
                f"{(held['done'] - held['failed']) / past:,.1f} req/s · {held['tokens'] / past:,.0f} tok/s · "
                f"{held['failed']} failed · {flying} in flight"
            )
            bar.update(task, completed=held["done"], live=live)

        yield seen
        bar.update(task, completed=held["done"])
