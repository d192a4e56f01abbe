"""`qvl ask`: a question about one or several pictures."""

from __future__ import annotations

import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl._printable import plain
from qvl.cli import options as o
from qvl.cli.terminal import json_line
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qvl.cli.batch import Answer
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.types import Result


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("ask")(ask)


def ask(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Files, globs, URLs, data: URLs, or - for stdin; none is allowed.")
    ] = None,
    question: Annotated[str, typer.Argument(help="The question, last.")] = ...,  # type: ignore[assignment]
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is written.")] = False,
    together: o.Together = False,
    model: o.Model = None,
    device: o.Device = None,
    base_url: o.BaseUrl = None,
    option: o.BackendOption = None,
    cache: o.CacheUrl = None,
    cache_mode: o.CacheModeName = None,
    max_pixels: o.MaxPixels = None,
    min_pixels: o.MinPixels = None,
    max_tokens: o.MaxTokens = None,
    param: o.Param = None,
    allow_private: o.AllowPrivate = None,
    iterations: o.Iterations = 1,
    concurrency: o.Jobs = None,
    as_json: o.AsJson = False,
    output: o.OutputFile = None,
    html: o.HtmlFile = None,
    verbose: o.Verbose = False,
) -> None:
    """Ask QUESTION about each picture, or with --together about all of them at once.

    Greedy answers (the default, temperature 0) and seeded ones are kept in the cache. Exit code: 0 all done, 1 some
    failed, 2 wrong use.
    """
    from qvl.cli import batch, parse_args
    from qvl.cli.sinks import RecordSink

    o.start_logs(verbose, as_json)
    _check_question(question, pictures or ())
    works = parse_args.pictures(pictures or (), together=together) or [parse_args.WorkItem("(no picture)", [])]
    settings = o.PipelineOptions(
        model=model,
        cache=cache,
        cache_mode=cache_mode,
        device=device,
        base_url=base_url or (),
        options=option or (),
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        max_tokens=max_tokens,
        params=param or (),
        allow_private=allow_private or (),
        concurrency=concurrency,
    )
    pipeline = settings.build()
    request = settings.request()
    many = len(works) > 1
    out = RecordSink(as_json=as_json, many=many and not stream, jsonl=output, html=html, title=f"qvl ask: {question}")

    async def one(source: Any, request_id: str) -> Answer:
        params = {**request, "system": system, "request_id": request_id}
        if stream:
            return None, await _stream(pipeline, source, question, params, as_json)
        return None, await pipeline.ask(source, question, **params)

    batch.end(
        batch.run(
            pipeline,
            works,
            one,
            out,
            iterations=iterations,
            progress=batch.wants_bar(works, as_json) and not stream,
            # Streams would be mixed up on one stdout.
            concurrency=1 if stream else concurrency,
            streams=stream,
        )
    )


def _check_question(question: str, pictures: Sequence[str]) -> None:
    """Raises ConfigError where nothing is asked, or a picture stands where the question belongs."""
    from qvl.cli import parse_args

    known = [given for given in (*pictures, question) if parse_args.is_picture(given)]
    if not question.strip() or (question in known and (not pictures or Path(question).suffix)):
        asked = next((given for given in pictures if given not in known), "What brand is it?")
        about = " ".join(known) or " ".join(pictures)
        raise ConfigError(f"no question about {about or 'nothing'}", hint=f'it comes last: qvl ask {about} "{asked}"')


async def _stream(
    pipeline: AsyncPipeline, source: Any, question: str, params: Mapping[str, Any], as_json: bool
) -> Result:
    """Prints each piece as it comes: plain text, or with `as_json` one object a piece."""
    from qvl.types import Chunk

    given = dict(params)
    system, cache = given.pop("system"), given.pop("cache", None)
    pictures = source if isinstance(source, list) else [source]
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    request = await pipeline.request([*messages, {"role": "user", "content": content}], **given)
    result: Result | None = None
    async with aclosing(pipeline.stream_run(request, cache=cache)) as chunks:
        async for chunk in chunks:
            if not isinstance(chunk, Chunk):
                result = chunk
            elif chunk.text:
                sys.stdout.write(_delta(chunk, request.request_id) + "\n" if as_json else plain(chunk.text))
                sys.stdout.flush()
    assert result is not None
    if not as_json:
        sys.stdout.write("\n")
    return result


def _delta(chunk: Any, request_id: str) -> str:
    return json_line({"request_id": request_id, "index": chunk.index, "delta": chunk.text})
