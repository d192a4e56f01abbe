"""Records one side with its pictures, for a comparison on a host that cannot see it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.decisions.questions import read_questions
from qvl.errors import ConfigError, QvlError
from qvl.media.picture import Picture
from qvl.parity.case import Case
from qvl.parity.comparison import ask_missing, header_of
from qvl.parity.record_file import RecordFile
from qvl.parity.sides import LiveSide, SideLike

if TYPE_CHECKING:
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.types import JsonMapping, JsonObject


async def record_cases(
    source: SideLike,
    cases: Sequence[Case],
    path: Path,
    request: JsonMapping,
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Record what `source` answers to `cases` in `path`, pictures included; return how many failed.

    A file that is there goes on where it ended.

    Raises:
        ConfigError: the file is of another side or other cases, or what would fail for every case.
    """
    side = LiveSide(source, request)
    try:
        await side.open()
        with RecordFile(path, header_of(side, cases, request)) as record:
            for case in cases:
                if f"case {case.id}" not in record.places:
                    record.add_case(await asyncio.to_thread(_as_json, case))
            await ask_missing(side, cases, record, advance)
            return sum(record.get(case.id).error is not None for case in cases)
    finally:
        await side.aclose()


def recorded_cases(record: RecordFile, folder: Path) -> list[Case]:
    """Return the cases of a record; their pictures are written to `folder`, so that not all are in memory.

    Raises:
        ConfigError: the record has none, or an answer is missing.
    """
    if not record.cases:
        raise ConfigError(f"{record.path} has no cases", hint="qvl parity record A -o golden.jsonl.gz")
    return [_case(record, name, folder) for name in record.cases]


def _as_json(case: Case) -> JsonObject:
    pictures = [base64.b64encode(_bytes(case, source)).decode() for source in case.pictures]
    return {"id": case.id, **case.facts(), "pictures": pictures}


def _bytes(case: Case, source: PictureLike) -> bytes:
    """Return the picture as it is stored, so that the other host reads it for itself; fetched ones as qvl made them."""
    from qvl.media import gate

    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike) and (path := Path(source).expanduser()).is_file():
        return path.read_bytes()
    try:
        return source.data if isinstance(source, Picture) else gate.load(source).data  # type: ignore[arg-type]
    except QvlError as exc:
        raise ConfigError(f"{case.id}: {exc.message}", hint=exc.hint) from exc


def _case(record: RecordFile, name: str, folder: Path) -> Case:
    facts = record.case(name)
    asked = facts.get("questions")
    analysis = facts.get("analysis")
    return Case(
        name,
        tuple(_stored(base64.b64decode(picture), folder) for picture in facts["pictures"]),
        question=facts.get("question"),
        questions=read_questions(asked) if asked else (),
        schema=analysis if isinstance(analysis, dict) else None,
    )


def _stored(data: bytes, folder: Path) -> Path:
    path = folder / hashlib.sha256(data).hexdigest()
    if not path.exists():
        path.write_bytes(data)
    return path
