"""`qvl parity`: where the answers of two deployments part, on your own pictures, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, TypeVar

import typer
from typer.core import TyperGroup

from qvl.cli import failure, options
from qvl.cli.expand import Without, expand
from qvl.cli.targets import build_target
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError, QvlError

if TYPE_CHECKING:
    from typer._click.core import Context

    from qvl.decisions.questions import Question
    from qvl.parity.budgets import Budgets
    from qvl.parity.case import Case
    from qvl.parity.record_file import RecordFile
    from qvl.parity.report import ParityReport
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import JsonMapping

_ask = partial(typer.Option, rich_help_panel="What to ask")
_output = partial(typer.Option, rich_help_panel="Output")
T = TypeVar("T")


class ParityGroup(TyperGroup):
    """`qvl parity A B` is `qvl parity compare A B`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["compare", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ParityGroup,
    no_args_is_help=True,
    help="Where the answers of two deployments part, and why. `qvl parity A B` is `qvl parity compare A B`.",
)
Target: TypeAlias = Annotated[
    str, typer.Argument(help="As --model takes it, its own options behind commas: MODEL,dtype=bfloat16")
]
_NOT_OF_PARITY: Final = Without("model", "lora", "calibration", "abstain", "cache", "cache_mode")
Settings: TypeAlias = Annotated[options.PipelineOptions, _NOT_OF_PARITY]
SelfCheckFlag: TypeAlias = Annotated[
    bool, typer.Option("--self-check", help="Ask A twice first: its noise is what two equal sides differ by.")
]


def register(root: typer.Typer) -> None:
    """Add the group to `root`."""
    root.add_typer(app, name="parity")


@dataclass(frozen=True, slots=True)
class AskOptions:
    """The options of the cases that both sides are asked."""

    pictures: Annotated[
        list[str] | None, _ask("--pictures", metavar="GLOB", help="Files, globs or URLs; may be repeated.")
    ] = None
    question: Annotated[list[str] | None, _ask("--question", "-q", help="Answered in words; may be repeated.")] = None
    questions: Annotated[
        Path | None, _ask(metavar="FILE", help='JSON lines: "What is it?" or {"type": "choice", …}.')
    ] = None
    analyze: Annotated[bool, _ask("--analyze", help="Analyse each picture; also what is done without a question.")] = (
        False
    )
    schema: Annotated[
        str | None, _ask("--schema", metavar="SCHEMA", help="Of the analysis: bill.json, bills.py:Bill.")
    ] = None
    language: Annotated[str | None, _ask("--language", "-l", help="en, zh, pt or es.")] = None

    def cases(self) -> list[Case]:
        """Return the cases.

        Raises:
            ConfigError: no picture, or a question that cannot be read.
        """
        from qvl.cli import parse_args
        from qvl.parity.case import check_ids, make_cases, read_question_file
        from qvl.pipeline.parse_request import listed

        texts: list[str] = [*(self.question or ())]
        questions: tuple[Question, ...] = ()
        if self.questions is not None:
            more, questions = read_question_file(self.questions)
            texts += more
        schema = None if self.schema is None else parse_args.schema(self.schema)
        work = parse_args.pictures(self.pictures or ())
        if not work:
            raise ConfigError("no picture given", hint="--pictures 'shop/*.jpg'")
        parse_args.refuse_missing(work)
        shown = [(item.label, tuple(listed(item.source))) for item in work]
        found = make_cases(shown, texts=texts, questions=questions, analyze=self.analyze, schema=schema)
        check_ids(found)
        return found


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """The options of the budgets, and of the files of a report."""

    budget: Annotated[
        list[str] | None, _output("--budget", metavar="NAME=SHARE", help="text=0.98,field.brand=0.995,kl=0.01")
    ] = None
    output: Annotated[Path | None, _output("--output", "-o", metavar="FILE", help="Write the report as JSON.")] = None
    html: Annotated[Path | None, _output(metavar="FILE", help="Write a page.")] = None
    junit: Annotated[Path | None, _output(metavar="FILE", help="Write JUnit's XML, for CI.")] = None
    concurrency: options.Concurrency = None
    as_json: options.AsJson = False
    verbose: options.Verbose = False

    def check(self) -> Budgets:
        """Return the budgets, once everything that can be is checked."""
        from qvl.parity.budgets import Budgets

        options.start_logs(self.verbose, self.as_json)
        for path, name in ((self.output, "--output"), (self.html, "--html"), (self.junit, "--junit")):
            if path is not None:
                options.check_writable(path, name)
        return Budgets.read(self.budget or ())

    def tell(self, report: ParityReport) -> None:
        """Print and write the report; exit with its code."""
        import json

        from qvl.bench.record import write_text

        if self.output is not None:
            write_text(self.output, json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
        if self.junit is not None:
            write_text(self.junit, report.to_junit())
        if self.html is not None:
            write_text(self.html, report.to_html())
        if self.as_json:
            print_json(report.to_json())
        else:
            _show(report)
        if report.retryable:
            text = f"{report.retryable} answers failed that may yet come: the same command asks those again"
            failure.stderr().print(text, style="yellow")
        if report.exit_code:
            raise typer.Exit(report.exit_code)


@app.command()
@expand
def compare(
    a: Target, b: Target, *, ask: AskOptions, self_check: SelfCheckFlag = False, settings: Settings, told: ReportOptions
) -> None:
    """Ask A and B the same about the same pictures; name the first layer where they part, and the cause.

    Layers: canonical pixels, picture tokens, template, prompt tokens, log-probabilities, text, fields, decisions. An
    interrupted run goes on where it ended, for a day. --base-url is the endpoint of the side that names none. Exit
    code: 0 within the budgets, 1 beyond one, 2 undecided with so many cases, wrong use, or a side cannot be opened.
    """
    budgets = told.check()
    cases = ask.cases()
    made = partial(build_target, settings=settings, language=ask.language, concurrency=told.concurrency, cache="off")
    sides = [made(name) for name in (a, b)]
    report = _compared(sides[0], sides[1], cases, budgets, settings.request(), told, self_check=self_check)
    told.tell(report)


@app.command()
@expand
def record(
    a: Target,
    *,
    ask: AskOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="golden.jsonl.gz: answers, and the pictures.")
    ],
    self_check: SelfCheckFlag = False,
    settings: Settings,
    concurrency: options.Concurrency = None,
    verbose: options.Verbose = False,
) -> None:
    """Record what A answers, for a host that cannot see it: `qvl parity check B golden.jsonl.gz` there.

    The file has the pictures too. The same command goes on where it was interrupted, and asks again what failed. Exit
    code: 0 all recorded, 1 some failed, 2 wrong use, or A cannot be opened.
    """
    from qvl.parity.golden import record_cases

    options.start_logs(verbose)
    options.check_writable(output, "--output")
    cases = ask.cases()
    pipeline = build_target(a, settings, language=ask.language, concurrency=concurrency, cache="off")
    work = partial(record_cases, pipeline, cases, output, settings.request(), self_check=self_check)
    failed = _run([pipeline], work, len(cases), shown=True)
    again = "; the same command asks those again" if failed else ""
    failure.stderr().print(f"{len(cases)} cases, {failed} failed: {output}{again}")
    if failed:
        raise typer.Exit(failure.FAILED)


@app.command()
@expand
def check(
    b: Target,
    golden: Annotated[Path, typer.Argument(help="What qvl parity record wrote.")],
    *,
    settings: Settings,
    told: ReportOptions,
) -> None:
    """Ask B what was recorded of A, and compare; all as `qvl parity A B` does. Exit code: as there."""
    from qvl.parity.golden import recorded_cases, recorded_request
    from qvl.parity.record_file import RecordFile

    budgets = told.check()
    with RecordFile(golden) as record, TemporaryDirectory(prefix="qvl-parity-") as folder:
        request = {**recorded_request(record), **settings.request()}
        cases = recorded_cases(record, Path(folder))
        side = build_target(b, settings, language=record.header["language"], concurrency=told.concurrency, cache="off")
        report = _compared(record, side, cases, budgets, request, told)
    told.tell(report)


def _compared(
    a: AsyncPipeline | RecordFile,
    b: AsyncPipeline,
    cases: Sequence[Case],
    budgets: Budgets,
    request: JsonMapping,
    told: ReportOptions,
    *,
    self_check: bool = False,
) -> ParityReport:
    from qvl.config import cache_folder
    from qvl.parity.comparison import acompare
    from qvl.pipeline.async_pipeline import AsyncPipeline

    live = [side for side in (a, b) if isinstance(side, AsyncPipeline)]
    work = partial(
        acompare, a, b, cases, budgets=budgets, self_check=self_check, request=request, work=cache_folder() / "parity"
    )
    return _run(live, work, len(cases) * len(live), shown=not told.as_json)


def _run(
    pipelines: Sequence[AsyncPipeline], work: Callable[..., Coroutine[object, object, T]], total: int, *, shown: bool
) -> T:
    """Return what `work` does, with a bar of `total` answers; close the pipelines.

    A side that cannot be opened ends the command with the code of wrong use: 1 would say that it answers otherwise.
    """
    from qvl.cli.run_pictures import progress_bar

    async def run() -> T:
        try:
            with progress_bar(shown, total, "answers") as advance:
                return await work(advance=advance)
        finally:
            for pipeline in pipelines:
                await pipeline.aclose()

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        failure.stderr().print("interrupted: the same command goes on", style="yellow")
        raise
    except QvlError as exc:
        failure.report(exc)
        raise typer.Exit(failure.WRONG_USE) from exc


def _show(report: ParityReport) -> None:
    """Print layers, agreement, budgets and causes."""
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout
    from qvl.parity.differences import LAYERS

    console = stdout()
    console.print(Text(f"A {report.a}"))
    console.print(Text(f"B {report.b}"))
    table = Table()
    for title in ("layer", "compared", "part first here"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    for layer in LAYERS:
        if layer in report.shown:
            parting = report.layers.get(layer, 0)
            style = "bold" if parting else ""
            table.add_row(Text(layer), Text(f"{report.shown[layer]}"), Text(f"{parting}", style=style))
    console.print(table)
    table = Table()
    for title in ("same", "cases", "share", "95 % of it"):
        named = title == "same"
        table.add_column(title, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for name, counted in report.agreement.items():
        low, high = counted.interval
        cells = (name, f"{counted.agree} of {counted.count}", f"{counted.share:.1%}", f"{low:.1%}–{high:.1%}")
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in report.lines():
        console.print(Text(line))
