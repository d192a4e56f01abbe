"""`qvl decide`: how probable each possible answer to a question about pictures is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure, options
from qvl.cli.expand import expand
from qvl.errors import ConfigError, QvlError, write_failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.cli.parse_args import WorkItem
    from qvl.decisions import Decisions
    from qvl.decisions.questions import Question, QuestionLike
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import JsonObject


@expand
def decide(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Files, globs, URLs, data: URLs, or - for stdin; none is allowed.")
    ] = None,
    *,
    question: options.QuestionTexts = None,
    choice: options.ChoiceTexts = None,
    score: options.ScoreTexts = None,
    questions: options.QuestionsFile = None,
    context: Annotated[str | None, typer.Option("--context", help="Text that is shown beside the pictures.")] = None,
    together: options.Together = False,
    settings: options.PipelineOptions,
    as_json: options.AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with bars.")] = None,
    verbose: options.Verbose = False,
) -> None:
    """Tell how probable each possible answer to a question is: yes or no, one of a list, or a level of a scale.

    Each answer is kept in the cache for itself: of known pictures only new questions are asked. Exit code: 0 all done,
    1 some failed, 2 wrong use.
    """
    from qvl.cli import parse_args

    options.start_logs(verbose, as_json)
    checked = asked_questions(question, choice, score, questions)
    if not checked:
        raise ConfigError("no question", hint='-q "Is it new?" or --choice "colour: red, blue"')
    work = parse_args.pictures(pictures or (), together=together) or [parse_args.WorkItem("(no picture)", [])]
    request = settings.request()
    pipeline = settings.build()
    failed = asyncio.run(_run(pipeline, work, checked, context, request, as_json, html))
    if failed:
        raise typer.Exit(failure.FAILED)


def asked_questions(
    question: Sequence[str] | None, choice: Sequence[str] | None, score: Sequence[str] | None, file: Path | None
) -> tuple[Question, ...]:
    """Return the questions of the options, in their order; none if there is no option.

    Raises:
        ConfigError: one that cannot be asked.
    """
    from qvl.decisions.questions import read_questions

    asked: list[QuestionLike] = [
        *(question or ()),
        *(_listed(text, "--choice") for text in choice or ()),
        *(_listed(text, "--score") for text in score or ()),
        *(_from_file(file) if file is not None else ()),
    ]
    try:
        return read_questions(asked) if asked else ()
    except QvlError as exc:
        raise ConfigError(exc.message, hint=exc.hint) from exc


async def _run(
    pipeline: AsyncPipeline,
    work: Sequence[WorkItem],
    questions: Sequence[QuestionLike],
    context: str | None,
    request: JsonObject,
    as_json: bool,
    html: Path | None,
) -> int:
    """Ask about each picture, print what comes, write the page; return how many pictures failed."""
    from qvl.cli.terminal import print_json
    from qvl.html.decisions import decisions_html
    from qvl.html.page import page_html

    articles, failed = ["<h1>qvl decide</h1>"], 0
    try:
        for item in work:
            try:
                answers = await pipeline.decide(item.source, questions, context, **request)
            except ConfigError:
                raise
            except QvlError as exc:
                failed += 1
                failure.report(exc, item.label)
                if as_json:
                    print_json({"picture": item.label, "ok": False, "error": failure.as_json(exc)})
                continue
            told = answers.to_json()
            if html is not None:
                articles.append(decisions_html(answers.pictures, told["answers"]))
            if as_json:
                print_json({"picture": item.label, "ok": True, **told})
            else:
                _show(item.label, answers)
    finally:
        await pipeline.aclose()
    if html is not None:
        await asyncio.to_thread(_write, html, page_html("qvl decide", "\n".join(articles)))
    return failed


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise write_failed(f"--html {path}", exc) from exc


def _show(label: str, answers: Decisions) -> None:
    """Print a table with a bar for each possible answer."""
    from rich.table import Table
    from rich.text import Text

    from qvl.analysis.product import UNTOLD
    from qvl.cli.console import stdout

    console = stdout()
    console.print(Text(f"{label} · {answers.backend}:{answers.model}", style="italic"))
    table = Table()
    for title in ("question", "answer", "", "probability", "label mass", "cache"):
        table.add_column(title, justify="right" if title in ("probability", "label mass") else "left")
    for answer in answers:
        shares = answer.probabilities if answer.probabilities is not None else {answer.value: None}
        for number, (value, share) in enumerate(shares.items()):
            bold = "bold" if value == answer.value and type(value) is type(answer.value) else ""
            word = str(value) if value is not None else "declined" if answer.abstained is None else UNTOLD
            if isinstance(value, bool):
                word = "yes" if value else "no"
            table.add_row(
                Text(answer.asked if not number else ""),
                Text(word, style=bold),
                Text("█" * round(20 * (share or 0.0))),
                Text("unknown" if share is None else f"{share:.1%}", style=bold),
                Text("" if number or answer.label_mass is None else f"{answer.label_mass:.3g}"),
                Text("" if number else answer.cache),
                end_section=number == len(shares) - 1,
            )
    console.print(table)
    for answer in answers:
        if answer.calibrated and answer.confidence is not None:
            untold = "" if answer.abstained is None else f"{UNTOLD}: "
            text = f"{answer.asked} {untold}{answer.confidence:.1%} of such answers are right (calibrated)"
            console.print(Text(text, style="yellow" if untold else ""))
    for note in dict.fromkeys(note for answer in answers for note in answer.notes):
        console.print(Text(f"note: {note}"))


def _listed(text: str, option: str) -> JsonObject:
    """Return the question of `"colour: red, blue, green"`."""
    # The last colon, since a question may have one too.
    asked, colon, rest = text.rpartition(":")
    values = [value.strip() for value in rest.split(",")]
    if not colon or not asked.strip() or not all(values):
        raise ConfigError(f"{option} {text!r} cannot be read", hint=f'{option} "colour: red, blue, green"')
    if option == "--choice":
        return {
            "type": "choice",
            "name": asked.strip(),
            "instructions": asked,
            "choices": [{"value": v} for v in values],
        }
    return {"type": "score", "name": asked.strip(), "instructions": asked, "levels": [{"label": v} for v in values]}


def _from_file(path: Path) -> list[JsonObject]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or f"not JSON: {exc}"
        raise ConfigError(f"--questions {path} cannot be read: {reason}", hint="a list of questions") from exc
    if isinstance(found, dict) and isinstance(found.get("questions"), list):
        found = found["questions"]
    if not isinstance(found, list):
        raise ConfigError(f"--questions {path} has no list of questions", hint='[{"type": "predicate", …}]')
    return found
