"""`qvl ask`: a question about one or several pictures."""

from __future__ import annotations

import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qvl._printable import plain
from qvl.cli import options
from qvl.cli.expand import Without, expand
from qvl.cli.terminal import json_line
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.cli.parse_args import Pictures
    from qvl.cli.run_pictures import Answer
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.parse_request import RequestParams
    from qvl.types import JsonObject, Result


@expand
def ask(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Files, globs, URLs, data: URLs, or - for stdin; none is allowed.")
    ] = None,
    *,
    question: Annotated[str, typer.Argument(help="The question, last.")],
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is written.")] = False,
    together: options.Together = False,
    settings: Annotated[options.PipelineOptions, Without("calibration", "abstain")],
    run: options.RunOptions,
) -> None:
    """Ask QUESTION about each picture, or with --together about all of them at once.

    Greedy answers (the default, temperature 0) and seeded ones are kept in the cache. Exit code: 0 all done, 1 some
    failed, 2 wrong use.
    """
    from qvl.cli import parse_args, run_pictures

    options.start_logs(run.verbose, run.as_json)
    _check_question(question, pictures or ())
    work_items = parse_args.pictures(pictures or (), together=together) or [parse_args.WorkItem("(no picture)", [])]
    request = settings.request() | {"system": system}
    pipeline = settings.build(concurrency=run.concurrency)

    async def answer_one(source: Pictures, request_id: str) -> Answer:
        params = request | {"request_id": request_id}
        if stream:
            return None, await _stream(pipeline, source, question, params, run.as_json)
        return None, await pipeline.ask(source, question, **params)

    run_pictures.run(pipeline, work_items, answer_one, run, title=f"qvl ask: {question}", streams=stream)


def _check_question(question: str, pictures: Sequence[str]) -> None:
    """Raise ConfigError if the question is empty or is the name of a picture."""
    from qvl.cli import parse_args

    files = [argument for argument in (*pictures, question) if parse_args.is_picture(argument)]
    if not question.strip() or (question in files and (not pictures or Path(question).suffix)):
        example = next((argument for argument in pictures if argument not in files), "What brand is it?")
        about = " ".join(files) or " ".join(pictures)
        raise ConfigError(f"no question about {about or 'a picture'}", hint=f'put it last: qvl ask {about} "{example}"')


async def _stream(
    pipeline: AsyncPipeline, source: Pictures, question: str, params: JsonObject, as_json: bool
) -> Result:
    """Print each chunk as it arrives, as text or (`as_json`) one JSON object per chunk, and return the Result."""
    from qvl.pipeline.call import ChatCall
    from qvl.pipeline.parse_request import question_messages
    from qvl.types import Chunk

    system, cache = params.pop("system"), params.pop("cache", None)
    call = ChatCall(question_messages(source, question, system), cache, cast("RequestParams", params))
    result: Result | None = None
    async with aclosing(pipeline.executor.stream(call)) as chunks:
        async for chunk in chunks:
            if not isinstance(chunk, Chunk):
                result = chunk
            elif chunk.text:
                delta = {"request_id": params["request_id"], "index": chunk.index, "delta": chunk.text}
                sys.stdout.write(json_line(delta) + "\n" if as_json else plain(chunk.text))
                sys.stdout.flush()
    assert result is not None
    if not as_json:
        sys.stdout.write("\n")
    return result
