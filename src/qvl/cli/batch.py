"""`qvl batch`: a file of requests in OpenAI's batch format, answered without a server."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure, options
from qvl.cli.expand import Without, expand
from qvl.cli.run_pictures import progress_bar
from qvl.errors import ConfigError, MissingDependencyError, write_failed

if TYPE_CHECKING:
    from qvl.server.batches.outputs import Outputs
    from qvl.server.state import ServerCore


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Answer a file of requests, line by line.")
    group.command("run")(run)
    app.add_typer(group, name="batch")


@expand
def run(
    *,
    file: Annotated[Path, typer.Argument(help="JSON lines, each with custom_id, method, url and body.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers go here; default: FILE.output.jsonl.")
    ] = None,
    errors: Annotated[Path | None, typer.Option(help="Errors go here; default: OUTPUT.errors.jsonl.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-j", min=1, help="Lines under way.")] = None,
    any_model_name: Annotated[bool, typer.Option(help="Answer lines that name another model too.")] = False,
    settings: Annotated[options.PipelineOptions, Without("max_tokens", "param")],
    verbose: options.Verbose = False,
) -> None:
    """Answer the requests of a file, as /v1/batches of qvl-serve does: chat, responses, completions and analyze.

    An interrupted run goes on where it was when it is started again: lines with an answer in the output are not asked
    again, those that failed are. Pictures may be files of this machine, by their paths. Exit code 1 if a line failed,
    2 if the file is not valid (nothing is asked then).
    """
    options.start_logs(verbose)
    try:
        from qvl.server.batches.outputs import Outputs
        from qvl.server.settings import ServerSettings
        from qvl.server.state import ServerCore
    except ModuleNotFoundError as exc:
        from qvl.suggest import install_line

        message = f"qvl batch needs the package {exc.name!r}"
        raise MissingDependencyError(message, hint=install_line("server")) from exc
    if not file.is_file():
        raise ConfigError(f"{file} is not a file", hint="a file of JSON lines", param="file")
    output = output or file.with_suffix(".output.jsonl")
    errors = errors or output.with_suffix(".errors.jsonl")
    paths = [path.resolve() for path in (file, output, errors)]
    if len(set(paths)) < len(paths):
        raise ConfigError("input, output and errors must be three files", hint="--output answers.jsonl")
    pipeline = settings.build(concurrency=concurrency)
    outputs = Outputs(output, errors)
    with _alone(output):
        server = ServerSettings(
            any_model_name=any_model_name,
            media=pipeline.executor.media,
            canary=False,
            batch_concurrency=concurrency or pipeline.concurrency,
        )
        try:
            asyncio.run(_answer(ServerCore(pipeline, server), file, outputs))
        except KeyboardInterrupt:
            failure.stderr().print(f"interrupted: {outputs.completed} answered; run it again to go on", style="yellow")
            raise
    told = f"{outputs.completed} answered in {output}"
    if outputs.failed:
        told += f", {outputs.failed} failed: see {errors}; run it again to ask those anew"
    failure.stderr().print(told, soft_wrap=True, highlight=False)
    if outputs.failed:
        raise typer.Exit(failure.FAILED)


async def _answer(core: ServerCore, file: Path, outputs: Outputs) -> None:
    from qvl.server.batches.lines import check_lines
    from qvl.server.batches.run_file import FileRun, Turns
    from qvl.server.route_table import questions

    routes = questions()
    try:
        count, _, problems = await check_lines(
            file, routes.keys(), core.served, max_line=core.settings.max_body_bytes, max_lines=sys.maxsize
        )
        if problems:
            for problem in problems:
                place = f"{file}:{problem['line']}" if problem["line"] is not None else str(file)
                failure.report(ConfigError(f"{place}: {problem['message']}"))
            raise ConfigError(f"{file} is not a valid file of requests", hint="nothing was asked")
        # What failed is asked again.
        outputs.errors.unlink(missing_ok=True)
        outputs.resume()
        await core.pipeline.open()
        core.start()
        await core.readiness.settled.wait()
        with progress_bar(sys.stderr.isatty(), count, "requests", outputs.completed) as advance:
            await FileRun(core, routes, Turns(core, core.settings.batch_concurrency), outputs, advance=advance).run(
                file
            )
        if (closed := core.readiness.closed()) is not None:
            raise closed
    finally:
        await core.aclose()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other runs from writing into `output`.

    Raises:
        ConfigError: another does, or its folder does not exist.
    """
    from qvl.server.batches.database import ProcessLock

    if not output.parent.is_dir():
        raise write_failed(f"--output {output}", OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
    path = output.with_name(output.name + ".lock")
    lock = ProcessLock(path)
    if not lock.take():
        raise ConfigError(f"another run writes into {output}", hint="wait for it, or name another --output")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.give_back()
