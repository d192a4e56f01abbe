"""Letters that UTF-8 does not have: half a surrogate pair in an answer, a file name or a question."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from xml.etree import ElementTree

from qvl import Pipeline
from qvl.bench.record import write_text
from qvl.parity import Case, ParityReport, compare
from qvl.parity.golden import record_cases, recorded_cases
from qvl.parity.record_file import RecordFile
from qvl.types import ChatRequest, Chunk
from tests.parity.test_diagnose import TellingBackend

HALF = "\ud83d"


class HalvingBackend(TellingBackend):
    """Ends with half a letter, as an endpoint does whose JSON escapes are cut."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                told = chunk.logprobs and tuple(
                    dataclasses.replace(one, token=one.token + HALF, top=one.top) for one in chunk.logprobs
                )
                yield dataclasses.replace(chunk, text=chunk.text and chunk.text + HALF, logprobs=told)


CASES = [Case("a", question="What?"), Case("name\udc80", question="What is it?")]


def written(report: ParityReport, folder: Path) -> None:
    write_text(folder / "report.json", json.dumps(report.to_json(), ensure_ascii=False))
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report.to_json()))
    write_text(folder / "report.html", report.to_html())
    write_text(folder / "report.xml", report.to_junit())
    ElementTree.parse(folder / "report.xml")


def test_halves_of_letters_are_compared_and_written(tmp_path: Path) -> None:
    with Pipeline(backend=TellingBackend(), cache="off") as a, Pipeline(backend=HalvingBackend(), cache="off") as b:
        report = compare(a, b, CASES, work=tmp_path)
    assert report.failed == (0, 0)
    assert report.layer is not None
    written(report, tmp_path)


def test_halves_of_letters_are_recorded(tmp_path: Path) -> None:
    golden = tmp_path / "golden.jsonl.gz"
    with Pipeline(backend=HalvingBackend(), cache="off") as a:
        assert asyncio.run(record_cases(a.pipeline, CASES, golden, {})) == 0
    with Pipeline(backend=HalvingBackend(), cache="off") as b, RecordFile(golden) as record:
        report = compare(record, b, recorded_cases(record, tmp_path))
    assert (report.layer, report.agreement["text"].agree) == (None, 2)
    written(report, tmp_path)


def test_halves_of_letters_are_in_what_other_commands_write(tmp_path: Path) -> None:
    """Each way in which a command writes a file: lines as they come, pages, exports."""
    from qvl.cli import decide, export

    decide._write(tmp_path / "page.html", HALF)
    export._write(tmp_path / "export.json", json.dumps(HALF, ensure_ascii=False))
    export._write_folder(tmp_path / "yolo", {"names.txt": HALF})
    for path in (tmp_path / "page.html", tmp_path / "yolo" / "names.txt"):
        assert path.read_text(encoding="utf-8") == "\\ud83d"
    assert json.loads((tmp_path / "export.json").read_text(encoding="utf-8")) == HALF
