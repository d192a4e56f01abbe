"""`qvl calibrate`: how often the answers of a model are right, by its confidence, from labelled pictures."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure, options
from qvl.cli.decide import asked_questions
from qvl.cli.expand import expand
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.calibration.abstain import Thresholds
    from qvl.calibration.calibration_file import Calibration
    from qvl.evaluation.calibrate import CalibrationReport
    from qvl.evaluation.collect import Collected, Collector
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import JsonObject

_labels = options.labels_option
DEFAULT = Path("calibration.json")


@expand
def calibrate(
    labelled: Annotated[
        list[str],
        typer.Argument(
            help='JSONL: {"image": "a.png", "expected": {"brand": "NORVIK"}}; CSV, parquet, folders of data sets.'
        ),
    ],
    *,
    schema: options.SchemaName = None,
    language: options.Language = None,
    question: options.QuestionTexts = None,
    choice: options.ChoiceTexts = None,
    score: options.ScoreTexts = None,
    questions: options.QuestionsFile = None,
    field: Annotated[
        list[str] | None, _labels("--field", help="Only this field of the schema; may be repeated.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        _labels(metavar="FIELD=RULE", help="exact, text, number:0.01, number:1%, iou:0.5; else by the label's kind."),
    ] = None,
    at_precision: Annotated[
        float | None, _labels(help="The least confidence at which so large a share of answers is right: 0.95.")
    ] = None,
    evidence: Annotated[
        bool, _labels(help="Of analyses with evidence; `expected.evidence` may have the box of each field.")
    ] = False,
    locate: Annotated[
        list[str] | None, _labels("--locate", help='Boxes of "the brand" by `locate`; may be repeated.')
    ] = None,
    settings: options.PipelineOptions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"The calibration; default: {DEFAULT}.", rich_help_panel="Output"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="A page with diagrams, or, named .json, its data.", rich_help_panel="Output"),
    ] = None,
    concurrency: options.Concurrency = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Ask about labelled pictures, compare, and write how often answers of each confidence are right.

    The file is used by --calibration, for the same model, dtype, schema and language. Answers are kept in the cache,
    so a run that was interrupted goes on. With --calibration nothing is written: that calibration is measured on these
    labels, and --abstain says what it would tell. Exit code: 0 all done, 1 some failed, 2 wrong use.
    """
    from qvl.calibration.abstain import read_abstain
    from qvl.calibration.calibration_file import Calibration
    from qvl.cli import parse_args
    from qvl.evaluation.collect import Collector
    from qvl.evaluation.compare import read_rules
    from qvl.evaluation.fit import check_installed
    from qvl.evaluation.labelled import read_labelled

    options.start_logs(verbose, as_json)
    check_installed()
    if at_precision is not None and not 0.0 < at_precision < 1.0:
        raise ConfigError(f"--at-precision {at_precision} is not a share", hint="between 0 and 1, such as 0.95")
    checked = None if settings.calibration is None else Calibration.load(settings.calibration)
    thresholds = read_abstain(settings.thresholds(), None if checked is None else checked.names)
    if checked is None and thresholds is not None:
        raise ConfigError("--abstain needs --calibration here", hint="--at-precision 0.95 finds a threshold")
    if checked is not None and output is not None:
        raise ConfigError(
            "--output and --calibration exclude each other: one is made, or measured", hint="leave one out"
        )
    target = output or DEFAULT
    for path, name in ((target if checked is None else None, "--output"), (report, "--report")):
        if path is not None:
            options.check_writable(path, name)
    lines = read_labelled(labelled)
    rules = read_rules(compare or ())
    schema_type = parse_args.schema(schema) if schema is not None else None
    asked = asked_questions(question, choice, score, questions)
    request = settings.request() | ({"evidence": True} if evidence else {})
    pipeline = replace(settings, abstain=None).build(language=language, concurrency=concurrency)
    collector = Collector(
        pipeline,
        lines,
        schema=schema_type,
        language=language,
        questions=asked,
        targets=locate or (),
        rules=rules,
        only=field or (),
        request=request,
    )
    collected, identity = _collect(pipeline, collector, len(lines), shown=not as_json)
    for where, why in collected.failed.items():
        failure.stderr().print(f"{where}: {why}", style="yellow", markup=False, highlight=False)
    made, measured = _measured(
        collector, collected, identity, checked, thresholds, at_precision, pipeline, labelled, len(lines)
    )
    if report is not None:
        _write_report(report, measured)
    if made is not None:
        from qvl.bench.record import write_text

        write_text(target, made.to_text())
    if as_json:
        print_json({**measured.to_json(), "calibration": None if made is None else str(target)})
    else:
        _show(measured)
        if made is not None:
            analyze = _words({"--schema": schema, "--language": language}) + ["--evidence"] * evidence
            decide = _words({"-q": question, "--choice": choice, "--score": score, "--questions": questions})
            _show_use(made, target, measured, settings, analyze, decide)
    if collected.failed:
        raise typer.Exit(failure.FAILED)


def _collect(pipeline: AsyncPipeline, collector: Collector, total: int, *, shown: bool) -> tuple[Collected, JsonObject]:
    """Ask; return what came, and the identity of the backend."""
    from qvl.cli.run_pictures import progress_bar

    done = 0

    async def work() -> tuple[Collected, JsonObject]:
        nonlocal done
        try:
            with progress_bar(shown, total, "labelled") as advance:

                def count() -> None:
                    nonlocal done
                    done += 1
                    advance()

                collected = await collector.collect(count)
            identity = pipeline.executor.identity()
            if identity is None:
                await pipeline.open()
            return collected, identity or pipeline.backend.identity()
        finally:
            await pipeline.aclose()

    try:
        return asyncio.run(work())
    except KeyboardInterrupt:
        text = f"interrupted: {done} of {total} done; the same command goes on"
        failure.stderr().print(text, style="yellow")
        raise


def _measured(
    collector: Collector,
    collected: Collected,
    identity: JsonObject,
    checked: Calibration | None,
    thresholds: Thresholds | None,
    precision: float | None,
    pipeline: AsyncPipeline,
    files: list[str],
    lines: int,
) -> tuple[Calibration | None, CalibrationReport]:
    """Return the calibration that was made, None where one was measured, and the report."""
    from qvl.evaluation import calibrate as making

    made = fits = None
    if checked is None:
        made, fits = making.calibrate(collector, collected, identity)
    return made, making.report(
        collected,
        model=f"{pipeline.backend.name}:{pipeline.backend.model}",
        files=files,
        lines=lines,
        fits=fits,
        precision=precision,
        thresholds=thresholds,
    )


def _write_report(path: Path, measured: CalibrationReport) -> None:
    import json

    from qvl.bench.record import write_text

    if path.suffix == ".json":
        write_text(path, json.dumps(measured.to_json(), ensure_ascii=False, indent=1) + "\n")
        return
    from qvl.evaluation.page import html

    write_text(path, html(measured))


def _show(measured: CalibrationReport) -> None:
    """Print a row for each field, and the thresholds as the options that set them."""
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout
    from qvl.evaluation.page import kept_text

    console = stdout()
    table = Table()
    for title in ("", "labels", "right", "ECE raw", "ECE", "95 % of it", "Brier"):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title), overflow="fold")
    for one in measured.fields:
        low, high = one.calibrated.ece_interval
        cells = (
            one.name,
            f"{one.labels}",
            f"{one.accuracy:.1%}",
            f"{one.raw.ece:.3f}",
            f"{one.calibrated.ece:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{one.calibrated.brier:.3f}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(Text(f"{measured.model} · {measured.answered} of {measured.lines} lines · {measured.held_out}"))
    for one in measured.fields:
        if measured.precision is not None and one.kind != "answer":
            console.print(Text(f"{one.name}, for {measured.precision:.0%}: {kept_text(one.at_precision)}"))
        if one.at_threshold is not None:
            console.print(Text(f"{one.name}: {kept_text(one.at_threshold)}"))


def _show_use(
    made: Calibration,
    target: Path,
    measured: CalibrationReport,
    settings: options.PipelineOptions,
    analyze: list[str],
    decide: list[str],
) -> None:
    """Print where the calibration is, and the commands that use it: each in one line, or it could not be pasted.

    `analyze` and `decide` are the options that name what was calibrated to those commands.
    """
    from rich.text import Text

    from qvl.calibration.calibration_file import evidence_name
    from qvl.cli.console import stdout

    model = {"-m": settings.model, "--device": settings.device, "--base-url": settings.base_url}
    common = _words({**model, "--lora": settings.lora, "-O": settings.option, "--calibration": target})
    commands = []
    if made.analysis is not None:
        names = [*made.analysis.fields, *map(evidence_name, made.analysis.evidence)]
        commands.append((["analyze", "PICTURE", *analyze], names))
    if made.decisions is not None:
        commands.append((["decide", "PICTURE", *decide], [one.name for one in made.decisions.questions.values()]))
    if made.locations is not None:
        targets = list(made.locations.targets)
        commands.append((["locate", "PICTURE", *map(shlex.quote, targets)], targets))
    least = {one.name: one.at_precision.threshold for one in measured.fields if one.at_precision is not None}
    stdout().print(Text(f"wrote {target}"), soft_wrap=True)
    for words, names in commands:
        abstain = [f"--abstain {shlex.quote(f'{name}={_rounded(least[name]):g}')}" for name in names if name in least]
        stdout().print(Text(" ".join(["use it: qvl", *words, *common, *abstain])), soft_wrap=True)


def _words(given: Mapping[str, str | Path | Sequence[str] | None]) -> list[str]:
    """Return options as words of a shell command, each in front of its value; without those of no value."""
    found = []
    for option, value in given.items():
        values = [] if value is None else [value] if isinstance(value, str | Path) else value
        found += [word for one in values for word in (option, shlex.quote(str(one)))]
    return found


def _rounded(threshold: float) -> float:
    """Return a threshold with few digits that tells no less than it: rounded down."""
    return int(threshold * 1e4) / 1e4
