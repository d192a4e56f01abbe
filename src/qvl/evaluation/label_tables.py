"""Labels in tables: CSV and parquet files, and folders as Hugging Face's datasets keep them.

Such a folder has `metadata.csv`, `metadata.jsonl` or `metadata.parquet` beside pictures or videos, shards `*.parquet`
with the pictures in them, or the `*.arrow` files of `save_to_disk`.

A row has its picture or video in one column of MEDIA (several in `images`) and may have an `id`. Its labels are in the
column `expected` as JSON or an object, or each in a column of its own: `brand`, `attributes.color`. An empty or null
cell is no label; the texts `true`, `false`, `null` and what is written as a JSON object or list are read as such.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.config import in_home
from qvl.errors import ConfigError
from qvl.evaluation.label_arrow import ARROW, arrow_rows, embedded
from qvl.types import JsonObject

MEDIA: Final = (
    "image", "image_path", "image_url", "file_name", "images", "video", "video_path", "video_url", "video_file_name",
)  # fmt: skip
_METADATA: Final = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TABLES: Final = (".csv", *ARROW)
_WORDS: Final[Mapping[str, object]] = {"true": True, "false": False, "null": None}
_HINT: Final = "columns: image, brand, attributes.color … or image, expected"


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row: its id, the pictures as they are written, its labels, the folder of relative paths, its place."""

    id: str
    pictures: tuple[str, ...]
    expected: JsonObject
    base: Path
    where: str


def is_table(pattern: str) -> bool:
    """True for what is read here and not as JSON lines."""
    path = in_home(pattern)
    return pattern.lower().endswith(_TABLES) or (path.is_dir() and bool(_files(path)))


def read_table(name: str) -> Iterator[LabelRow]:
    """Yield the rows of a file or glob of files, or of all files of a folder and its subfolders.

    Raises:
        ConfigError: it cannot be read, or a row has no picture or no label; the row is named.
        MissingDependencyError: parquet without the package pyarrow.
    """
    path = in_home(name)
    files = [path]
    if path.is_dir():
        files = _files(path)
    elif not path.is_file():
        files = [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ConfigError(f"{name} cannot be read: no such file", hint="check the path")
    for file in files:
        # Of the folder's own files, since each split may have one of a name.
        label = str(file.relative_to(path)) if path.is_dir() else file.name
        for place, row in _rows(file):
            yield _row(file, f"{label}:{place}", row)


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its rows: those of metadata, else its shards."""
    found = sorted(path for name in _METADATA for path in folder.rglob(name))
    for suffix in ARROW if not found else ():
        found = found or sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("cache-"))
    return found


def _rows(file: Path) -> Iterator[tuple[int, JsonObject]]:
    if file.suffix.lower() in ARROW:
        yield from enumerate(arrow_rows(file), start=1)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".csv":
                yield from _csv_rows(file, csv.DictReader(lines, strict=True))
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ConfigError(f"{file.name}:{number}: no JSON object", hint=_HINT)
                    yield number, value
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror}", hint="check the path") from exc
    except (UnicodeDecodeError, ValueError, csv.Error) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}", hint=_HINT) from exc


def _csv_rows(file: Path, rows: csv.DictReader[str]) -> Iterator[tuple[int, JsonObject]]:
    names = rows.fieldnames or ()
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file.name}: the column {twice!r} stands there twice", hint="name each column once")
    for row in rows:
        if None in row:
            raise ConfigError(f"{file.name}:{rows.line_num}: more cells than columns", hint='quote cells with a ","')
        yield rows.line_num, dict(row)


def _row(file: Path, where: str, row: JsonObject) -> LabelRow:
    place = next((name for name in MEDIA if row.get(name)), None)
    if place is None:
        raise ConfigError(f"{where}: no picture", hint=_HINT)
    labels = _value(row["expected"], where) if row.get("expected") else None
    if isinstance(labels, str):
        raise ConfigError(f"{where}: `expected` must be an object", hint='{"brand": "NORVIK"}')
    if labels is None:
        labels = {}
        for name, cell in row.items():
            if name not in (*MEDIA, "id", "expected") and cell not in ("", None):
                _put(labels, name.split("."), _value(cell, where), where)
    if not isinstance(labels, dict) or not labels:
        raise ConfigError(f"{where}: no right answer", hint=_HINT)
    shown = row[place]
    if isinstance(shown, str) and shown.lstrip().startswith("["):
        shown = _value(shown, where)
    pictures = tuple(_source(one, where, place) for one in (shown if isinstance(shown, list) else [shown]))
    return LabelRow(str(row.get("id") or where), pictures, labels, file.parent, where)


def _source(shown: object, where: str, column: str) -> str:
    """Return the path or URL of a picture; one that is in the table itself is written to a file first."""
    if isinstance(shown, Mapping):
        data, name = shown.get("bytes"), shown.get("path") or shown.get("url")
        shown = embedded(data, str(name or "")) if isinstance(data, bytes) else name
    elif isinstance(shown, bytes):
        shown = embedded(shown, "")
    if not isinstance(shown, str) or not shown:
        raise ConfigError(f"{where}: {column!r} has no picture", hint="a path, a URL, or the bytes of a picture")
    return shown


def _put(labels: JsonObject, path: list[str], value: object, where: str) -> None:
    for name in path[:-1]:
        labels = labels.setdefault(name, {})
        if not isinstance(labels, dict):
            raise ConfigError(f"{where}: {name!r} is a label and has labels in it", hint="name columns apart")
    labels[path[-1]] = value


def _value(cell: object, where: str) -> object:
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if text in _WORDS:
        return _WORDS[text]
    if text[:1] not in ("{", "["):
        return cell
    try:
        found: object = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: {text[:40]!r} is not JSON", hint=_HINT) from exc
    return found
