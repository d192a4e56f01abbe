"""`qvl read`: the text of documents, page by page."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from html import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final

import typer

from qvl.cli import failure, options
from qvl.cli.expand import Without, expand
from qvl.errors import ConfigError, QvlError, write_failed

if TYPE_CHECKING:
    from qvl.cli.parse_args import WorkItem
    from qvl.evidence.page_text import ReadForm
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.read_pages import ReadPage
    from qvl.types import JsonObject

_ENDINGS: Final = ("", ".md", ".markdown", ".txt", ".html", ".htm")
_HEAD: Final = """<!doctype html>
<html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title></head>
<body>
"""


@expand
def read(
    documents: Annotated[list[str], typer.Argument(help="PDFs or pictures: files, quoted globs, URLs, or -.")],
    *,
    form: Annotated[
        str | None, typer.Option("--form", metavar="FORM", help="markdown, or html with the box of each element.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file (.md, .html), or a folder for several documents.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per page on stdout.")] = False,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-j", min=1, help="Pages under way.")] = None,
    verbose: options.Verbose = False,
    settings: Annotated[options.PipelineOptions, Without("calibration", "abstain", "video")],
) -> None:
    """Read DOCUMENTS as text, page by page: Markdown, or HTML with boxes (data-bbox, thousandths of the page).

    Each page is kept in the cache: a run that was broken off, repeated, asks only for the pages that are missing. Exit
    code: 0 all done, 1 a page could not be read, 2 wrong use.
    """
    from qvl.cli import parse_args

    options.start_logs(verbose, as_json)
    work_items = parse_args.pictures(documents)
    wanted = _form(form, output)
    folder = output is not None and output.is_dir()
    if len(work_items) > 1 and output is not None and not folder:
        raise ConfigError(f"--output {output} is one file for {len(work_items)} documents", hint="name a folder")
    if output is not None and not folder:
        options.check_writable(output, "--output")
    request = settings.request()
    pipeline = settings.build(concurrency=concurrency)
    reader = _Reader(pipeline, wanted, output, request, as_json=as_json)

    async def work() -> None:
        try:
            for item in work_items:
                await reader.read(item)
        finally:
            await pipeline.aclose()

    try:
        asyncio.run(work())
    except KeyboardInterrupt:
        failure.stderr().print(f"interrupted: {reader.done} pages done; the same command goes on", style="yellow")
        raise
    if reader.failed:
        raise typer.Exit(failure.FAILED)


def _form(form: str | None, output: Path | None) -> ReadForm:
    from qvl.evidence.page_text import FORMS

    ending = "" if output is None or output.is_dir() else output.suffix.lower()
    if form is None and ending not in _ENDINGS:
        hint = "--output report.md or report.html; with --form any name"
        raise ConfigError(f"{output} would be Markdown or HTML, not {ending}", hint=hint)
    named = form or ("html" if ending in (".html", ".htm") else "markdown")
    for known in FORMS:
        if named == known:
            return known
    raise ConfigError(f"unknown --form {named!r}", hint=f"{' or '.join(FORMS)}")


class _Reader:
    """Reads documents one after the other, and writes each page when it comes."""

    def __init__(
        self, pipeline: AsyncPipeline, form: ReadForm, output: Path | None, request: JsonObject, *, as_json: bool
    ) -> None:
        self._pipeline, self._form, self._output, self._request = pipeline, form, output, request
        self._as_json = as_json
        self.done = 0
        self.failed = False

    async def read(self, item: WorkItem) -> None:
        from qvl.pipeline.parse_request import listed

        (source,) = listed(item.source)
        try:
            async with aclosing(self._pipeline.read(source, form=self._form, **self._request)) as pages:
                await self._write(item.label, pages)
        except ConfigError:
            raise
        except QvlError as exc:
            self.failed = True
            failure.report(exc, item.label)

    async def _write(self, label: str, pages: object) -> None:
        from collections.abc import AsyncGenerator
        from typing import cast

        from qvl.cli.run_pictures import progress_bar

        coming = cast("AsyncGenerator[ReadPage, None]", pages)
        first = await anext(coming)
        path = self._path(label)
        # Not where the text and the bar would share one terminal.
        shown = first.count > 1 and (path is not None or not sys.stdout.isatty())
        with progress_bar(shown, first.count, "pages") as advance:
            file = _Sheet(path, label, self._form, as_json=self._as_json, several=first.count > 1)
            try:
                self._add(file, first)
                advance()
                async for page in coming:
                    self._add(file, page)
                    advance()
            finally:
                file.close()

    def _add(self, file: _Sheet, page: ReadPage) -> None:
        file.add(page)
        self.done += page.ok
        if page.error is not None:
            self.failed = True
            failure.report(page.error, page.source)
        elif page.cut:
            line = f"{page.source}: cut at the longest answer; raise --max-tokens"
            failure.stderr().print(line, style="yellow", markup=False, highlight=False)

    def _path(self, label: str) -> Path | None:
        if self._output is None or not self._output.is_dir():
            return self._output
        name = Path(label.partition("#")[0].partition("?")[0]).stem or "document"
        return self._output / f"{name}.{'html' if self._form == 'html' else 'md'}"


class _Sheet:
    """The output of one document: a file, or stdout, or JSON lines there."""

    def __init__(self, path: Path | None, label: str, form: ReadForm, *, as_json: bool, several: bool) -> None:
        self._html, self._several, self._as_json, self._path = form == "html", several, as_json, path
        self._file: IO[str] | None = None
        self._pages = 0
        if path is not None:
            try:
                self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
            except OSError as exc:
                raise write_failed(f"--output {path}", exc) from exc
        if self._html:
            self._put(_HEAD.format(title=escape(Path(label).name)))

    def add(self, page: ReadPage) -> None:
        """Write one page, and see that it is in the file before the next one is waited for."""
        from qvl.cli.terminal import json_line

        text = page.text
        if page.error is not None:
            text = f"<!-- Page {page.number} could not be read: {page.error.message.replace('--', '- -')} -->\n"
        if self._html:
            size = f' data-width="{page.width}" data-height="{page.height}"' if page.ok else ""
            self._put(f'<section class="page" data-page="{page.number}"{size}>\n{text}</section>\n')
        else:
            mark = f"<!-- Page {page.number} -->\n\n" if self._several else ""
            self._put(("\n" if self._pages else "") + mark + text)
        self._pages += 1
        if self._as_json:
            _print(json_line(page.to_json()) + "\n")

    def close(self) -> None:
        """Write the end of the document."""
        if self._html:
            self._put("</body></html>\n")
        if self._file is not None:
            self._file.close()

    def _put(self, text: str) -> None:
        if self._file is None:
            if not self._as_json:
                _print(text)
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as exc:
            raise write_failed(f"--output {self._path}", exc) from exc


def _print(text: str) -> None:
    from qvl._printable import plain

    sys.stdout.write(plain(text))
    sys.stdout.flush()
