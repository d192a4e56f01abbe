"""`qvl analyze`: product pictures in, typed analyses out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import options as o

if TYPE_CHECKING:
    from qvl.cli.batch import Answer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("analyze")(analyze)


def analyze(
    pictures: Annotated[list[str], typer.Argument(help="Files, globs, URLs, data: URLs, or - for stdin.")],
    schema: Annotated[
        str | None,
        typer.Option("--schema", metavar="SCHEMA", help="Your own: bill.json, bills.py:Bill or module:Bill."),
    ] = None,
    language: Annotated[str | None, typer.Option("--language", "-l", help="en, zh, pt or es.")] = None,
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
    """Look at product pictures and give brand, category and attributes, each with a confidence.

    Answers are kept in the cache: the same picture, model and settings are answered from there. Exit code: 0 all done,
    1 some failed, 2 wrong use.
    """
    from qvl.cli import batch, parse_args
    from qvl.cli.sinks import RecordSink

    o.start_logs(verbose, as_json)
    works = parse_args.pictures(pictures, together=together)
    batch.no_pictures(works)
    wanted = parse_args.schema(schema) if schema is not None else None
    settings = o.PipelineOptions(
        model=model,
        cache=cache,
        cache_mode=cache_mode,
        language=language,
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

    async def one(source: Any, request_id: str) -> Answer:
        found = await pipeline.analyze_result(source, schema=wanted, request_id=request_id, **request)
        return found, found.result

    out = RecordSink(as_json=as_json, many=len(works) > 1, jsonl=output, html=html, title="qvl analyze")
    batch.end(
        batch.run(
            pipeline,
            works,
            one,
            out,
            iterations=iterations,
            progress=batch.wants_bar(works, as_json),
            concurrency=concurrency,
        )
    )
