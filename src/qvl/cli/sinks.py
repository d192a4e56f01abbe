"""Outputs for records: stdout, a file of JSON lines, an HTML report. An interrupted run keeps all written records."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qvl.cli import failure
from qvl.cli.options import check_writable
from qvl.errors import write_failed

if TYPE_CHECKING:
    from qvl.cli.records import PictureRecord
    from qvl.html.report import HtmlReport


class RecordSink:
    """Writes each record when it is added; `finish()` writes the outputs that need all of them.

    Raises:
        ConfigError: a file cannot be written; checked before the first picture is processed.
    """

    def __init__(
        self, *, as_json: bool, many: bool, jsonl: Path | None = None, html: Path | None = None, title: str = "qvl"
    ) -> None:
        self.records: list[PictureRecord] = []
        self._as_json = as_json
        self._many = many
        self._lines: IO[str] | None = None
        self._html = html
        self._report: HtmlReport | None = None
        if html is not None:
            from qvl.html.report import HtmlReport

            check_writable(html, "--html")
            self._report = HtmlReport(title)
        if jsonl is not None:
            try:
                self._lines = jsonl.open("w", encoding="utf-8", errors="backslashreplace")
            except OSError as exc:
                raise write_failed(f"--output {jsonl}", exc) from exc

    @property
    def failed(self) -> bool:
        return any(not record.ok for record in self.records)

    def add(self, record: PictureRecord, *, streamed: bool = False) -> None:
        """Write one record; `streamed` means that its answer was printed already."""
        self.records.append(record.without_pictures())
        if record.error is not None:
            failure.report(record.error, record.picture)
        line = record.to_json() if self._as_json or self._lines is not None else ""
        if self._lines is not None:
            self._write(self._lines, line)
        if self._report is not None:
            self._report.add(record)
        if self._as_json:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        elif not self._many and record.ok:
            self._show(record, streamed)

    def _write(self, lines: IO[str], line: str) -> None:
        try:
            lines.write(line + "\n")
            lines.flush()
        except OSError as exc:
            self._lines = None
            with contextlib.suppress(OSError):
                lines.close()
            raise write_failed(f"--output {lines.name}", exc) from exc

    def _show(self, record: PictureRecord, streamed: bool) -> None:
        from qvl.cli import tables
        from qvl.cli.console import stdout

        assert record.result is not None
        if not streamed:
            tables.show_one(record)
            return
        tables.stages(record)
        tables.notes(record.result)
        stdout().print(tables.took(record))

    def end_iteration(self, iteration: int) -> None:
        """Print the summary of an iteration; to be called after its last picture."""
        if self._many and not self._as_json:
            from qvl.cli import tables

            tables.show_many([record for record in self.records if record.iteration == iteration])

    def finish(self) -> None:
        """Write and close the files; calling it twice is harmless."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._report is not None and self._html is not None:
            try:
                self._report.write(self._html)
            except OSError as exc:
                raise write_failed(f"--html {self._html}", exc) from exc
            self._report = None
