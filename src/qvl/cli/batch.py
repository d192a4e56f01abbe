"""The run of `ask` and `analyze`: pictures through the pipeline, some at a time, answers out in their order."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from qvl.cli import failure
from qvl.cli.records import PictureRecord
from qvl.errors import ConfigError, QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qvl.analysis.product import AnalysisResult
    from qvl.cli.parse_args import WorkItem
    from qvl.cli.sinks import RecordSink
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import Result

Answer: TypeAlias = "tuple[AnalysisResult[Any] | None, Result]"
One: TypeAlias = Callable[[Any, str], Awaitable[Answer]]
log = logger("qvl.cli")


@dataclass(frozen=True, slots=True)
class Work:
    """One picture (or several, shown together) on its way, under its request id."""

    given: WorkItem
    request_id: str


def run(
    pipeline: AsyncPipeline,
    works: Sequence[WorkItem],
    one: One,
    output: RecordSink,
    *,
    iterations: int = 1,
    progress: bool = False,
    concurrency: int | None = None,
    streams: bool = False,
) -> int:
    """Answers for every work, `iterations` times over; returns the exit code.

    `streams` says that `one` prints what it answers. After Ctrl-C the files hold what was done.

    Raises:
        ConfigError: nothing can work as it is set up; the same for every picture, so the first ends the run.
    """

    async def work() -> None:
        try:
            with _bar(progress, len(works) * iterations) as advance:
                for iteration in range(1, iterations + 1):
                    await _once(pipeline, works, one, output, iteration, advance, concurrency, streams)
        finally:
            await pipeline.aclose()

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        done = len(output.records)
        failure.stderr().print(f"interrupted: {done} of {len(works) * iterations} done", style="yellow")
        raise
    finally:
        output.finish()
    return failure.FAILED if output.failed else 0


async def _once(
    pipeline: AsyncPipeline,
    works: Sequence[WorkItem],
    one: One,
    output: RecordSink,
    iteration: int,
    advance: Callable[[], None],
    concurrency: int | None,
    streams: bool,
) -> None:
    from qvl.pipeline.async_pipeline import new_request_id
    from qvl.pipeline.map_in_order import map_in_order

    async def answer(work: Work) -> Answer:
        try:
            answered = await _logged(work, one)
        except QvlError:
            advance()
            raise
        # Not where the run was cut off: the bar counts what was done.
        advance()
        return answered

    batch = [Work(given, new_request_id()) for given in works]
    async with aclosing(map_in_order(batch, answer, concurrency or pipeline.concurrency, False)) as items:
        async for item in items:
            if isinstance(item.error, ConfigError):
                raise item.error
            given = batch[item.index].given
            output.add(
                PictureRecord(
                    index=item.index,
                    iteration=iteration,
                    picture=given.label,
                    request_id=batch[item.index].request_id,
                    result=item.result,
                    analysis=item.value,
                    error=item.error,
                ),
                shown=streams,
            )
    output.end_iteration(iteration)


async def _logged(work: Work, one: One) -> Answer:
    from structlog.contextvars import bound_contextvars

    with bound_contextvars(request_id=work.request_id):
        log.info("request started", picture=work.given.label)
        try:
            return await one(work.given.source, work.request_id)
        except QvlError as exc:
            log.info("request failed", error=str(exc), code=exc.code)
            raise


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, so that stdout stays what it is."""
    if not wanted:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Redirection would send JSON lines to stderr.
    with Progress(*columns, console=failure.stderr(), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("pictures", total=total)
        yield lambda: bar.advance(task)


def wants_bar(works: Sequence[WorkItem], as_json: bool) -> bool:
    """For several pictures; not where JSON lines and the bar would share one terminal."""
    return len(works) > 1 and not (as_json and sys.stdout.isatty())


def no_pictures(works: Sequence[WorkItem]) -> None:
    if not works:
        raise ConfigError("no picture named", hint="name a file, a glob, a URL, or - for stdin")


def end(code: int) -> None:
    """Ends the command with `code`."""
    if code:
        raise typer.Exit(code)
