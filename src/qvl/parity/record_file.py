"""A file of observations: each is a gzip member of its own, so that a process that is killed loses none before."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from qvl._version import __version__
from qvl.errors import ConfigError, write_failed
from qvl.parity.observation import Observation
from qvl.types import JsonMapping, JsonObject

FORMAT: Final = "qvl-parity"
VERSION: Final = 1
_PIECE: Final = 1 << 16


class RecordFile:
    """Observations of one side by case; the header says of whom and of what. Opened, it goes on where it ended.

    Only where each case lies is held in memory. A line that a killed process left unfinished is cut off.

    Args:
        path: of the file; made if it is missing.
        header: what is recorded; None reads what is there.

    Raises:
        ConfigError: it is no such file, or of another run; it cannot be read or written.
    """

    def __init__(self, path: Path, header: JsonMapping | None = None) -> None:
        self.path = path
        # As it is read back: with lists for tuples.
        header = None if header is None else json.loads(json.dumps(header))
        self.places: dict[str, int] = {}
        self.cases: list[str] = []
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
        for start, stop, line in _members(self._file):
            end = stop
            try:
                value = json.loads(line)
                if found is None:
                    found = self._header(value)
                elif "observation" in value:
                    self.places[value["observation"]["case"]] = start
                else:
                    self.cases.append(value["case"]["id"])
                    self.places.setdefault(f"case {value['case']['id']}", start)
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise self._none() from exc
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

    def _header(self, value: JsonObject) -> JsonObject:
        if value["format"] != FORMAT:
            raise self._none()
        if value["version"] != VERSION:
            what = f"{self.path} has version {value['version']} of the format, this qvl reads {VERSION}"
            raise ConfigError(what, hint="record it anew, or use the qvl that wrote it")
        return value

    def _none(self) -> ConfigError:
        return ConfigError(f"{self.path} is not a record of qvl parity", hint="qvl parity record A -o golden.jsonl.gz")

    def _append(self, value: JsonMapping, end: int | None = None) -> int:
        start = self._file.seek(0, os.SEEK_END) if end is None else self._file.seek(end)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        try:
            self._file.write(gzip.compress(text.encode("utf-8", "surrogatepass") + b"\n", mtime=0))
            self._file.flush()
        except OSError as exc:
            raise write_failed(str(self.path), exc) from exc
        return start

    def add(self, observation: Observation) -> None:
        """Append an observation; it is in the file when this returns."""
        self.places[observation.case] = self._append({"observation": observation.to_json()})

    def add_case(self, case: JsonMapping) -> None:
        """Append what a case asks, with its `id`, unless it is there."""
        if f"case {case['id']}" not in self.places:
            self.places[f"case {case['id']}"] = self._append({"case": case})
            self.cases.append(case["id"])

    def case(self, name: str) -> JsonObject:
        """Return what `add_case` was given."""
        found: JsonObject = self._line(f"case {name}")["case"]
        return found

    def get(self, case: str) -> Observation:
        """Return the observation of a case that is in `places`.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return Observation.read(self._line(case)["observation"])
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"{self.path}: the record of {case} is damaged", hint="record it anew") from exc

    def _line(self, name: str) -> JsonObject:
        self._file.seek(self.places[name])
        unpack, text = zlib.decompressobj(31), b""
        while not unpack.eof and (piece := self._file.read(_PIECE)):
            text += unpack.decompress(piece)
        value: JsonObject = json.loads(text)
        return value

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _members(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, content) of each whole gzip member; ends before one that is cut off."""
    file.seek(0)
    start, rest = 0, b""
    while True:
        unpack, text, taken = zlib.decompressobj(31), b"", 0
        try:
            while not unpack.eof:
                piece = rest or file.read(_PIECE)
                if not piece:
                    return
                text += unpack.decompress(piece)
                rest = unpack.unused_data
                taken += len(piece) - len(rest)
        except zlib.error:
            return
        yield start, start + taken, text
        start += taken
