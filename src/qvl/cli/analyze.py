"""`qvl analyze`: typed analyses of product pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import options
from qvl.cli.expand import expand
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.cli.parse_args import Pictures
    from qvl.cli.run_pictures import Answer


@expand
def analyze(
    pictures: Annotated[list[str], typer.Argument(help="Files, globs, URLs, data: URLs, or - for stdin.")],
    *,
    schema: options.SchemaName = None,
    language: options.Language = None,
    evidence: Annotated[bool, typer.Option("--evidence", help="Also the box where each field is seen.")] = False,
    together: options.Together = False,
    settings: options.PipelineOptions,
    run: options.RunOptions,
) -> None:
    """Look at product pictures and give brand, category and attributes, each with a confidence.

    Answers are kept in the cache: the same picture, model and settings are answered from there. Exit code: 0 all done,
    1 some failed, 2 wrong use.
    """
    from qvl.cli import parse_args, run_pictures

    options.start_logs(run.verbose, run.as_json)
    work_items = parse_args.pictures(pictures, together=together)
    if not work_items:
        raise ConfigError("no picture given", hint="name a file, a glob, a URL, or - for stdin")
    schema_type = parse_args.schema(schema) if schema is not None else None
    request = settings.request() | ({"evidence": True} if evidence else {})
    pipeline = settings.build(language=language, concurrency=run.concurrency)

    async def answer_one(source: Pictures, request_id: str) -> Answer:
        analysis = await pipeline.analyze_result(source, schema=schema_type, request_id=request_id, **request)
        return analysis, analysis.result

    run_pictures.run(pipeline, work_items, answer_one, run, title="qvl analyze")
