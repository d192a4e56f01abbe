"""Records one side with its pictures, for a comparison on a host that cannot see it."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Required

from typing_extensions import TypedDict

from qvl.analysis.schema_types import schema_type
from qvl.decisions.questions import read_questions
from qvl.errors import ConfigError, QvlError, write_failed
from qvl.media.picture import Picture
from qvl.parity.case import Case, digest
from qvl.parity.comparison import ask_missing, header_of, measure_noise
from qvl.parity.record_file import RecordFile
from qvl.parity.sides import LiveSide, SideLike
from qvl.types import JsonObject

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from qvl.pipeline.parse_parts import PictureLike
    from qvl.types import JsonMapping


async def record_cases(
    source: SideLike,
    cases: Sequence[Case],
    path: Path,
    request: JsonMapping,
    advance: Callable[[], None] = lambda: None,
    *,
    self_check: bool = False,
) -> int:
    """Record what `source` answers to `cases` in `path`, pictures included; return how many failed.

    A file that is there goes on where it ended, and cases that failed are asked again. With `self_check` it is asked
    twice about the first cases, so that the file also tells what it differs by from itself.

    Raises:
        ConfigError: the file is of another side or other cases, or what would fail for every case.
    """
    side = LiveSide(source, request)
    try:
        await side.open()
        with RecordFile(path, header_of(side, await asyncio.to_thread(digest, cases), request)) as record:
            for case in cases:
                if case.id not in record.cases:
                    record.add_case(await asyncio.to_thread(_as_json, case))
            if self_check and record.self_check is None:
                record.add_self_check(await measure_noise(side, cases))
            await ask_missing(side, cases, record, advance)
            return sum(case.id in record.failed for case in cases)
    finally:
        await side.aclose()


def recorded_cases(record: RecordFile, folder: Path) -> list[Case]:
    """Return the cases of a record; their pictures are written to `folder`, so that not all are in memory.

    Raises:
        ConfigError: the record has none, or one that cannot be asked.
    """
    if not record.cases:
        raise ConfigError(f"{record.path} has no cases", hint="qvl parity record A -o golden.jsonl.gz")
    return [_case(record, name, folder) for name in record.cases]


def recorded_request(record: RecordFile) -> JsonMapping:
    """Return the parameters with which each case was asked.

    Raises:
        ConfigError: one of them is none of a recorded request.
    """
    request: JsonMapping = record.header["request"]
    if "cache" in request:
        what = f"{record.path}: line 1: its request has 'cache', which a recorded request does not have"
        raise ConfigError(what, hint="record it anew")
    return request


def _as_json(case: Case) -> JsonObject:
    pictures = [base64.b64encode(_bytes(case, source)).decode() for source in case.pictures]
    return {"id": case.id, **case.facts(), "pictures": pictures}


def _bytes(case: Case, source: PictureLike) -> bytes:
    """Return the picture as it is stored, so that the other host reads it for itself; fetched ones as qvl made them."""
    from qvl.media import gate

    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    try:
        if isinstance(source, str | os.PathLike) and (path := Path(source).expanduser()).is_file():
            return path.read_bytes()
        return source.data if isinstance(source, Picture) else gate.load(source).data  # type: ignore[arg-type]
    except QvlError as exc:
        raise ConfigError(f"{case.id}: {exc.message}", hint=exc.hint) from exc
    except OSError as exc:
        raise ConfigError(f"{case.id}: {source} cannot be read: {exc.strerror}", hint="check the path") from exc


def _case(record: RecordFile, name: str, folder: Path) -> Case:
    try:
        facts = _facts().validate_python(record.case(name))
        asked, analysis = facts.get("questions"), facts.get("analysis")
        if isinstance(analysis, dict):
            schema_type(analysis)
        return Case(
            name,
            tuple(_stored(base64.b64decode(picture, validate=True), folder) for picture in facts["pictures"]),
            question=facts.get("question"),
            questions=read_questions(asked) if asked else (),
            schema=analysis if isinstance(analysis, dict) else None,
        )
    except (ValueError, KeyError, TypeError) as exc:
        why = exc.message if isinstance(exc, QvlError) else " ".join(str(exc).split())[:200]
        raise ConfigError(f"{record.path}: the case {name} cannot be asked: {why}", hint="record it anew") from exc


class CaseFacts(TypedDict):
    """The facts of a case in a record: its pictures in base64, and one of the others."""

    pictures: Required[list[str]]
    question: NotRequired[str]
    questions: NotRequired[list[JsonObject]]
    analysis: NotRequired[str | JsonObject]


@functools.cache
def _facts() -> TypeAdapter[CaseFacts]:
    from pydantic import TypeAdapter

    return TypeAdapter(CaseFacts)


def _stored(data: bytes, folder: Path) -> Path:
    path = folder / hashlib.sha256(data).hexdigest()
    if not path.exists():
        try:
            path.write_bytes(data)
        except OSError as exc:
            raise write_failed(str(path), exc) from exc
    return path
