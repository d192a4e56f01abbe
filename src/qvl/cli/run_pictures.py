"""The run of `ask`, `analyze` and `locate` over many pictures: concurrent work, answers printed in input order."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import typer

from qvl.cli import failure
from qvl.cli.records import PictureRecord
from qvl.errors import ConfigError, QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qvl.analysis.product import AnalysisResult
    from qvl.cli.options import RunOptions
    from qvl.cli.parse_args import Pictures, WorkItem
    from qvl.cli.sinks import RecordSink
    from qvl.evidence.located import Locations
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import Result

Answer: TypeAlias = "tuple[AnalysisResult[object] | Locations | None, Result]"
AnswerOne: TypeAlias = "Callable[[Pictures, str], Awaitable[Answer]]"
log = logger("qvl.cli")


def run(
    pipeline: AsyncPipeline,
    work_items: Sequence[WorkItem],
    answer_one: AnswerOne,
    options: RunOptions,
    *,
    title: str,
    streams: bool = False,
) -> None:
    """Answer every work item with `answer_one`, `options.iterations` times; exit with code 1 if one failed.

    `streams`: `answer_one` prints its answer itself; `title` heads the HTML report. Ctrl-C keeps what is finished.

    Raises:
        ConfigError: a setting is invalid; it would fail for every picture, so the first error ends the run.
    """
    from qvl.cli.sinks import RecordSink

    many = len(work_items) > 1
    output = RecordSink(
        as_json=options.as_json, many=many and not streams, jsonl=options.output, html=options.html, title=title
    )
    # Not where JSON lines and the bar would share one terminal.
    progress = many and not streams and not (options.as_json and sys.stdout.isatty())
    # Streams would be mixed up on one stdout.
    concurrency = 1 if streams else options.concurrency or pipeline.concurrency
    total = len(work_items) * options.iterations

    async def work() -> None:
        try:
            with progress_bar(progress, total, "pictures") as advance:
                for iteration in range(1, options.iterations + 1):
                    await _once(work_items, answer_one, output, iteration, advance, concurrency, streams)
        finally:
            await pipeline.aclose()

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        failure.stderr().print(f"interrupted: {len(output.records)} of {total} done", style="yellow")
        raise
    finally:
        output.finish()
    if output.failed:
        raise typer.Exit(failure.FAILED)


async def _once(
    work_items: Sequence[WorkItem],
    answer_one: AnswerOne,
    output: RecordSink,
    iteration: int,
    advance: Callable[[], None],
    concurrency: int,
    streams: bool,
) -> None:
    from qvl.analysis.product import AnalysisResult
    from qvl.evidence.located import Locations
    from qvl.ids import new_request_id
    from qvl.pipeline.map_in_order import map_in_order

    async def answer(numbered: tuple[WorkItem, str]) -> Answer:
        try:
            answered = await _logged(*numbered, answer_one)
        except QvlError:
            advance()
            raise
        # Not where the run was cut off: the bar counts what was done.
        advance()
        return answered

    batch = [(work, new_request_id()) for work in work_items]
    async with aclosing(map_in_order(batch, answer, concurrency, False)) as items:
        async for item in items:
            if isinstance(item.error, ConfigError):
                raise item.error
            work, request_id = batch[item.index]
            record = PictureRecord(
                index=item.index,
                iteration=iteration,
                picture=work.label,
                request_id=request_id,
                result=item.result,
                analysis=item.value if isinstance(item.value, AnalysisResult) else None,
                located=item.value if isinstance(item.value, Locations) else None,
                error=item.error,
            )
            output.add(record, streamed=streams)
    output.end_iteration(iteration)


async def _logged(work: WorkItem, request_id: str, answer_one: AnswerOne) -> Answer:
    from structlog.contextvars import bound_contextvars

    with bound_contextvars(request_id=request_id):
        log.info("request started", picture=work.label)
        try:
            return await answer_one(work.source, request_id)
        except QvlError as exc:
            log.info("request failed", error=str(exc), code=exc.code)
            raise


@contextmanager
def progress_bar(shown: bool, total: int, what: str, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr and yield a function that advances it by one."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Redirection would send JSON lines to stderr.
    with Progress(*columns, console=failure.stderr(), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda: bar.advance(task)
