"""A file of observations: each is a gzip member of its own, so that a process that is killed loses none before."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from qvl._version import __version__
from qvl.errors import ConfigError, write_failed
from qvl.parity.observation import Observation, SelfCheck
from qvl.types import JsonMapping, JsonObject

FORMAT: Final = "qvl-parity"
VERSION: Final = 1
# What a header has, and the kind of each.
HEADER: Final[dict[str, type]] = {"model": str, "identity": dict, "language": str, "cases": str, "request": dict}
# Most bytes of an unpacked line: the pictures of one case. A small file may unpack to any size.
MOST_BYTES: Final = 256 << 20
_PIECE: Final = 1 << 16
# How each line begins: the constant part of what gzip.compress(…, mtime=0) writes.
_MEMBER: Final = gzip.compress(b"", mtime=0)[:10]
_AGAIN: Final = "record it anew, or copy it again from where it is whole"


class RecordFile:
    """Observations of one side by case; the header says of whom and of what. Opened, it goes on where it ended.

    Only where each case lies is held in memory. To go on, a line that a killed process left unfinished is cut off; one
    that is damaged otherwise is refused, as is everything but whole lines where the file is only read.

    Args:
        path: of the file; made if it is missing.
        header: what is recorded; None reads what is there.

    Attributes:
        places: by case, where its observation is.
        failed: the cases whose observation is an error.
        cases: by case, where what it asks is; empty where pictures are not recorded.
        self_check: the noise of the side; None if it was not measured.

    Raises:
        ConfigError: it is no such file, damaged, or of another run; it cannot be read or written.
    """

    def __init__(self, path: Path, header: JsonMapping | None = None) -> None:
        self.path = path
        # As it is read back: with lists for tuples.
        header = None if header is None else json.loads(json.dumps(header))
        self.places: dict[str, int] = {}
        self.failed: set[str] = set()
        self.cases: dict[str, int] = {}
        self.self_check: SelfCheck | None = None
        try:
            self._file: BinaryIO = path.open("rb" if header is None else "r+b" if path.exists() else "w+b")
        except OSError as exc:
            raise ConfigError(f"{path} cannot be opened: {exc.strerror}", hint="check the path") from exc
        try:
            if header is not None:
                self._lock()
            self.header = self._read(header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(f"another process writes {self.path}", hint="wait for it, or end it") from exc

    def _read(self, wanted: JsonMapping | None) -> JsonMapping:
        end, found = 0, None
        for number, (start, stop, line) in enumerate(self._members(torn=wanted is not None), start=1):
            end = stop
            try:
                value = json.loads(line)
                if found is None:
                    found = self._header(value, whole=wanted is None)
                elif "observation" in value:
                    self._place(str(value["observation"]["case"]), start, value["observation"]["error"])
                elif "self_check" in value:
                    self.self_check = SelfCheck.read(value["self_check"])
                else:
                    self.cases.setdefault(str(value["case"]["id"]), start)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
                if isinstance(exc, ConfigError):
                    raise
                if found is None:
                    raise self._none() from exc
                raise ConfigError(f"{self.path}: line {number} is broken", hint=_AGAIN) from exc
        if found is None and (wanted is None or self.path.stat().st_size > 0 == end):
            raise self._none()
        if wanted is None:
            assert found is not None
            return found
        if found is None:
            self._append({"format": FORMAT, "version": VERSION, "qvl": __version__, **wanted}, 0)
            return wanted
        for name, value in wanted.items():
            if found.get(name) != value:
                what = f"{self.path} was recorded of another {name}"
                raise ConfigError(what, hint="name another file, or remove it")
        self._file.truncate(end)
        return found

    def _header(self, value: JsonObject, *, whole: bool) -> JsonObject:
        if value["format"] != FORMAT:
            raise self._none()
        if value["version"] != VERSION:
            what = f"{self.path} has version {value['version']} of the format, this qvl reads {VERSION}"
            raise ConfigError(what, hint="record it anew, or use the qvl that wrote it")
        for name, kind in HEADER.items() if whole else ():
            if not isinstance(value.get(name), kind):
                what = "is not what it must be" if name in value else "is missing"
                raise ConfigError(f"{self.path}: line 1: {name!r} {what}", hint=_AGAIN)
        return value

    def _none(self) -> ConfigError:
        return ConfigError(f"{self.path} is not a record of qvl parity", hint="qvl parity record A -o golden.jsonl.gz")

    def _place(self, case: str, start: int, error: str | None) -> None:
        # The last one holds: a case that failed is asked again.
        self.places[case] = start
        (self.failed.discard if error is None else self.failed.add)(case)

    def _append(self, value: JsonMapping, end: int | None = None) -> int:
        start = self._file.seek(0, os.SEEK_END) if end is None else self._file.seek(end)
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > MOST_BYTES:
            what = f"a line of {len(line) >> 20} MiB does not fit into {self.path}"
            raise ConfigError(what, hint=f"at most {MOST_BYTES >> 20} MiB a case: fewer or smaller pictures")
        try:
            self._file.write(gzip.compress(line, mtime=0))
            self._file.flush()
        except OSError as exc:
            raise write_failed(str(self.path), exc) from exc
        return start

    def missing(self, case: str) -> bool:
        """True if the case has no answer here: it was not asked, or failed."""
        return case not in self.places or case in self.failed

    def add(self, observation: Observation) -> None:
        """Append an observation, which holds from now on; it is in the file when this returns."""
        start = self._append({"observation": observation.to_json()})
        self._place(observation.case, start, observation.error)

    def add_case(self, case: JsonMapping) -> None:
        """Append what a case asks, with its `id`, unless it is there."""
        if case["id"] not in self.cases:
            self.cases[case["id"]] = self._append({"case": case})

    def add_self_check(self, checked: SelfCheck) -> None:
        """Append what the side differs by from itself."""
        self._append({"self_check": dataclasses.asdict(checked)})
        self.self_check = checked

    def case(self, name: str) -> JsonObject:
        """Return what `add_case` was given."""
        found: JsonObject = self._line(self.cases[name])["case"]
        return found

    def get(self, case: str) -> Observation:
        """Return the observation of a case that is in `places`.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return Observation.read(self._line(self.places[case])["observation"])
        except (ValueError, KeyError, TypeError) as exc:
            if isinstance(exc, ConfigError):
                raise
            raise ConfigError(f"{self.path}: the record of {case} is damaged", hint=_AGAIN) from exc

    def _line(self, start: int) -> JsonObject:
        found = next(self._members(start), None)
        if found is None:
            raise ConfigError(f"{self.path} has become shorter", hint="another program writes it")
        value: JsonObject = json.loads(found[2])
        return value

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _members(self, start: int = 0, *, torn: bool = False) -> Iterator[tuple[int, int, bytes]]:
        """Yield (start, end, content) of each gzip member from `start` on; `torn` allows the last to be unfinished.

        Raises:
            ConfigError: a member is damaged, unpacks to more than MOST_BYTES, or is cut off unless `torn` allows it.
        """
        rest, number = b"", 0
        self._file.seek(start)
        while True:
            unpack, text, taken, number = zlib.decompressobj(31), bytearray(), 0, number + 1
            try:
                while not unpack.eof:
                    piece, rest = rest or self._file.read(_PIECE), b""
                    if not piece:
                        if taken and not (torn and not self._goes_on(start + 1)):
                            raise self._damaged("is cut off", number, start)
                        return
                    text += unpack.decompress(piece, MOST_BYTES + 1 - len(text))
                    if len(text) > MOST_BYTES:
                        raise self._damaged(f"unpacks to more than {MOST_BYTES >> 20} MiB", number, start)
                    taken += len(piece) - len(unpack.unused_data)
            except zlib.error as exc:
                if start == 0:
                    raise self._none() from exc
                raise self._damaged("is broken", number, start) from exc
            rest = unpack.unused_data
            yield start, start + taken, bytes(text)
            start += taken

    def _damaged(self, how: str, number: int, start: int) -> ConfigError:
        where = f"line {number}" if number > 1 or not start else "a line"
        return ConfigError(f"{self.path} {how} in {where}, at byte {start}", hint=_AGAIN)

    def _goes_on(self, start: int) -> bool:
        """Whether a line begins behind `start`, so that what is there was not the last to be written."""
        self._file.seek(start)
        before = b""
        while piece := self._file.read(_PIECE):
            if _MEMBER in before + piece:
                return True
            before = piece[-len(_MEMBER) :]
        return False
