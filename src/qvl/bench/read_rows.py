"""The rows of a benchmark's files: JSON lines, JSON, CSV, text, parquet and Arrow, also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, cast

from qvl.bench.apis import NoRequestError
from qvl.errors import ConfigError

_ARROW: Final = (".parquet", ".arrow")
# Of a folder; the others may be notes beside them.
_KINDS: Final = (".jsonl", ".ndjson", *_ARROW)
_GZIP: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"


def is_read(path: Path) -> bool:
    """True if the name of a file of a folder is that of rows."""
    return _kind(path) in _KINDS and not path.name.startswith(".")


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (number from 1, value) of each row; the value is an error where a line is not JSON.

    `.json` is one list of rows, one request, or JSON lines after all; `.txt` has a prompt a line; `.csv` a row of
    columns; other names are JSON lines. What begins as gzip is unpacked.

    Raises:
        ConfigError: the file cannot be read.
        MissingDependencyError: parquet without the package pyarrow.
    """
    kind = _kind(path)
    try:
        if kind in _ARROW:
            from qvl.evaluation.label_arrow import arrow_rows

            if path.suffix.lower() == ".gz":
                raise ConfigError(f"{path} cannot be read", hint="unpack it: parquet is compressed within")
            yield from enumerate(arrow_rows(path), 1)
            return
        with _opened(path) as lines:
            if kind == ".json":
                yield from _json_rows(lines.read())
            elif kind == ".csv":
                reader = csv.DictReader(io.TextIOWrapper(lines, "utf-8-sig", newline=""), strict=True)
                for row in reader:
                    yield reader.line_num, {name: _cell(cell) for name, cell in row.items() if cell}
            else:
                yield from _lines(lines, kind == ".txt")
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise ConfigError(f"{path} cannot be unpacked: {exc}", hint="it is cut off, or not gzip") from exc
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}", hint="check the path") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}", hint="save it as UTF-8") from exc


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")


def _json_rows(data: bytes) -> Iterator[tuple[int, object]]:
    try:
        value = json.loads(data.removeprefix(_BOM))
    except (ValueError, RecursionError):
        yield from _lines(io.BytesIO(data), False)
        return
    is_list = isinstance(value, list) and not all(isinstance(row, dict) and "role" in row for row in value)
    yield from enumerate(value if is_list else [value], 1)


def _lines(lines: IO[bytes], texts: bool) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(_BOM).strip()
        if not line:
            continue
        try:
            yield number, line.decode() if texts else json.loads(line)
        except (ValueError, RecursionError) as exc:
            yield number, NoRequestError(f"invalid JSON: {str(exc)[:100]}" if not texts else "not UTF-8")


def _cell(cell: object) -> object:
    """Return a cell of CSV; what is written as a JSON object or list is read as such."""
    if isinstance(cell, str):
        if cell.lstrip()[:1] in ("[", "{"):
            try:
                return json.loads(cell)
            except ValueError:
                return cell
        return int(cell) if cell.isdigit() else cell
    return cell
