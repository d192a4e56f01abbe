"""`qvl eval`: how often the answers of a model are right, from labelled pictures, and against another model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from qvl.cli import failure, options
from qvl.cli.decide import asked_questions
from qvl.cli.expand import Without, expand
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError, QvlError

if TYPE_CHECKING:
    from qvl.evaluation.against import Against
    from qvl.evaluation.evaluate import EvalReport, Evaluator, WrongPart
    from qvl.media.picture import Picture
    from qvl.pipeline.async_pipeline import AsyncPipeline

BEYOND: Final = 1
UNDECIDED: Final = 2
_labels = options.labels_option


def register(root: typer.Typer) -> None:
    """Add the command to `root`."""
    root.command("eval")(evaluate)


@expand
def evaluate(
    labelled: Annotated[
        list[str],
        typer.Argument(
            help='JSONL: {"image": "a.png", "expected": {"brand": "NORVIK"}}; CSV, parquet, folders of data sets.'
        ),
    ],
    *,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Another, with its own options: MODEL,dtype=bfloat16"),
    ] = None,
    allow: Annotated[
        float | None, typer.Option("--allow", help="The loss of accuracy against it that is allowed: 0.01.")
    ] = None,
    schema: options.SchemaName = None,
    language: options.Language = None,
    question: options.QuestionTexts = None,
    choice: options.ChoiceTexts = None,
    score: options.ScoreTexts = None,
    questions: options.QuestionsFile = None,
    compare: Annotated[
        list[str] | None,
        _labels(metavar="FIELD=RULE", help="exact, text, number:0.01, number:1%, iou:0.5; else by the label's kind."),
    ] = None,
    settings: Annotated[options.PipelineOptions, Without("calibration", "abstain")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report as JSON.", rich_help_panel="Output")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page.", rich_help_panel="Output")] = None,
    concurrency: options.Concurrency = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how often answers are right: by field and overall, with intervals; and whether another model is better.

    Labels are as for qvl calibrate; what is not labelled is not compared. Answers are kept in the cache, so a run that
    was interrupted goes on; what failed is asked again. Exit code: 0 done, 1 some failed or with --allow beyond it, 2
    undecided with so many labels, wrong use, or a model that cannot be opened.
    """
    from qvl.cli.targets import build_target
    from qvl.evaluation.against import against as compared
    from qvl.evaluation.compare import read_rules
    from qvl.evaluation.evaluate import Evaluator
    from qvl.evaluation.labelled import read_labelled

    options.start_logs(verbose, as_json)
    if allow is not None and not (against and 0.0 <= allow < 1.0):
        raise ConfigError(f"--allow {allow:g} cannot be used", hint="a share such as 0.01, beside --against MODEL")
    for path, name in ((output, "--output"), (html, "--html")):
        if path is not None:
            options.check_writable(path, name)
    from qvl.cli import parse_args

    lines = read_labelled(labelled)
    asked = asked_questions(question, choice, score, questions)
    names = {one.name or str(one.instructions) for one in asked}
    only = sorted({name for line in lines for name in line.expected if name not in names})
    rules = read_rules(compare or ())
    schema_type = parse_args.schema(schema) if schema is not None else None
    pipelines = [settings.build(language=language, concurrency=concurrency)]
    if against is not None:
        other = build_target(against, settings, language=language, concurrency=concurrency, cache=settings.cache)
        pipelines.append(other)
    evaluators = [
        Evaluator(
            pipeline, lines, schema=schema_type, language=language, questions=asked, rules=rules, only=only,
            request=settings.request(),
        )
        for pipeline in pipelines
    ]  # fmt: skip
    reports = _evaluated(pipelines, evaluators, len(lines), shown=not as_json)
    for report in reports:
        of = f"{report.model}: " if len(reports) > 1 else ""
        for where, why in report.failed.items():
            failure.stderr().print(f"{of}{where}: {why}", style="yellow", markup=False, highlight=False)
    both = compared(reports[0], reports[1], allow) if len(reports) > 1 else None
    _write(reports[0], both, output, html)
    if as_json:
        print_json(_json(reports[0], both))
    else:
        _show(reports[0], both)
    if both is not None and both.standing == "undecided":
        raise typer.Exit(UNDECIDED)
    if any(report.failed for report in reports) or (both is not None and both.standing == "beyond"):
        raise typer.Exit(BEYOND)


def _evaluated(
    pipelines: Sequence[AsyncPipeline], evaluators: Sequence[Evaluator], lines: int, *, shown: bool
) -> list[EvalReport]:
    """Return the report of each, one after another, so that one model at a time is loaded.

    One that cannot be opened ends the command with the exit code of wrong use: 1 would say that it answers worse.
    """
    from qvl.cli.run_pictures import progress_bar
    from qvl.parity.sides import shown_model

    done = 0

    async def work() -> list[EvalReport]:
        nonlocal done
        reports = []
        try:
            # What is wrong with the second is told before the first is asked.
            for pipeline in pipelines:
                await asyncio.to_thread(pipeline.backend.refuse_missing)
                if not pipeline.backend.wants_pixels:
                    await pipeline.open()
            with progress_bar(shown, lines * len(pipelines), "labelled") as advance:

                def count() -> None:
                    nonlocal done
                    done += 1
                    advance()

                for pipeline, evaluator in zip(pipelines, evaluators, strict=True):
                    await pipeline.open()
                    reports.append(await evaluator.evaluate(shown_model(pipeline.backend), count))
                    await pipeline.aclose()
            return reports
        finally:
            for pipeline in pipelines:
                await pipeline.aclose()

    try:
        return asyncio.run(work())
    except KeyboardInterrupt:
        text = f"interrupted: {done} of {lines * len(pipelines)} done; the same command goes on"
        failure.stderr().print(text, style="yellow")
        raise
    except QvlError as exc:
        failure.report(exc)
        raise typer.Exit(failure.WRONG_USE) from exc


def _json(report: EvalReport, both: Against | None) -> dict[str, object]:
    told = {"format": "qvl-eval-report", "version": 1, **report.to_json()}
    return told if both is None else {**told, "against": both.to_json()}


def _write(report: EvalReport, both: Against | None, output: Path | None, html: Path | None) -> None:
    from qvl.bench.record import write_text

    if output is not None:
        write_text(output, json.dumps(_json(report, both), ensure_ascii=False, indent=1) + "\n")
    if html is not None:
        from qvl.html.evaluate import eval_html

        other = None if both is None else both.to_json()
        write_text(html, eval_html(report.to_json(), other, _pictures(report.wrong)))


def _pictures(wrong: Sequence[WrongPart]) -> dict[str, list[Picture]]:
    """Return the pictures of the wrong answers by line, as far as they can be read."""
    from qvl.media import gate

    found: dict[str, list[Picture]] = {}
    for one in wrong:
        try:
            found[one.line] = [gate.load(source, decode=False) for source in one.pictures]
        except QvlError:
            found[one.line] = []
    return found


def _show(report: EvalReport, both: Against | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout

    console = stdout()
    measures = {
        "F1": [one.items.f1 if one.items else None for one in report.fields],
        "similarity": [one.similarity for one in report.fields],
        "IoU": [one.iou for one in report.fields],
        "ECE": [one.calibration_error for one in report.fields],
    }
    # Only those that some field has: a terminal has 80 columns.
    told = {title: column for title, column in measures.items() if any(value is not None for value in column)}
    table = Table()
    for title in ("", "right", "accuracy", "95 % of it", *told):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title), overflow="fold")
    for place, one in enumerate(report.fields):
        low, high = one.interval
        more = [column[place] for column in told.values()]
        cells = (one.name, f"{one.right} of {one.labels}", f"{one.accuracy:.1%}", f"{low:.1%}–{high:.1%}")
        table.add_row(*map(Text, cells), *(Text("" if value is None else f"{value:.3f}") for value in more))
    console.print(table)
    usage = report.usage
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    console.print(Text(f"{report.model} · {report.lines} lines · {tokens} · {report.seconds:.1f} s"))
    if both is None:
        return
    console.print(Text(f"against {both.other.model}, line by line:"))
    table = Table()
    for title in ("", "model", "against", "gain", "95 % of it", "McNemar p"):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title), overflow="fold")
    for name, paired in both.fields.items():
        low, high = paired.interval
        shares = (f"{right} of {paired.count}" for right in (paired.right_b, paired.right_a))
        gain = (f"{paired.difference:+.1%}", f"{low:+.1%} to {high:+.1%}", f"{paired.p_value:.3g}")
        table.add_row(*map(Text, (name, *shares, *gain)))
    console.print(table)
    for score in (one for one in both.scores if one.interval is not None or one.difference):
        lies = "" if score.interval is None else f" [{score.interval[0]:+.3f}, {score.interval[1]:+.3f}]"
        text = f"{score.field}, {score.measure}: {score.b:.3f}, against {score.a:.3f}: {score.difference:+.3f}{lies}"
        console.print(Text(text))
    if both.allow is not None:
        need = f"; about {both.lines_needed} lines would tell" if both.standing == "undecided" else ""
        console.print(Text(f"a loss of {both.allow:.2%} is allowed: {both.standing}{need}"))
