"""Labels in tables: CSV files, and folders as Hugging Face's datasets keep pictures (`metadata.csv`, `metadata.jsonl`).

A row has its picture in `image`, `image_path`, `image_url` or `file_name` and may have an `id`. Its labels are in the
column `expected` as JSON, or each in a column of its own: `brand`, `attributes.color`. An empty cell is no label;
`true`, `false`, `null` and what is written as a JSON object or list are read as such.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.errors import ConfigError
from qvl.types import JsonObject

METADATA: Final = ("metadata.jsonl", "metadata.csv")
_PICTURE: Final = ("image", "image_path", "image_url", "file_name")
_WORDS: Final[Mapping[str, object]] = {"true": True, "false": False, "null": None}
_HINT: Final = "columns: image, brand, attributes.color … or image, expected"


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row: its id, the picture as it is written, its labels, the folder of relative paths, and where it stands."""

    id: str
    picture: str
    expected: JsonObject
    base: Path
    where: str


def is_table(pattern: str) -> bool:
    """True for what is read here and not as JSON lines."""
    return pattern.lower().endswith((".csv", ".parquet")) or Path(pattern).expanduser().is_dir()


def read_table(name: str) -> Iterator[LabelRow]:
    """Yield the rows of a CSV file, or of all metadata files in a folder and its subfolders.

    Raises:
        ConfigError: it cannot be read, or a row has no picture or no label; the row is named.
    """
    path = Path(name).expanduser()
    if name.lower().endswith(".parquet"):
        raise ConfigError(f"{name}: parquet is not read", hint="save it as JSON lines or CSV: df.to_csv(…)")
    files = [path]
    if path.is_dir():
        files = sorted(found for kind in METADATA for found in path.rglob(kind))
        if not files:
            raise ConfigError(f"the folder {name} has no labels", hint=f"one of {', '.join(METADATA)} in it")
    for file in files:
        for where, row in _rows(file):
            yield _row(file, where, row)


def _rows(file: Path) -> Iterator[tuple[str, JsonObject]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".csv":
                for number, row in enumerate(csv.DictReader(lines), start=2):
                    yield f"{file.name}:{number}", {key: value for key, value in row.items() if key is not None}
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ConfigError(f"{file.name}:{number}: no JSON object", hint=_HINT)
                    yield f"{file.name}:{number}", value
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror}", hint="check the path") from exc
    except (UnicodeDecodeError, ValueError, csv.Error) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}", hint=_HINT) from exc


def _row(file: Path, where: str, row: JsonObject) -> LabelRow:
    place = next((name for name in _PICTURE if row.get(name)), None)
    if place is None:
        raise ConfigError(f"{where}: no picture", hint=_HINT)
    labels = _value(row["expected"], where) if row.get("expected") else None
    if labels is None:
        labels = {}
        for name, cell in row.items():
            if name not in (*_PICTURE, "id", "expected") and cell not in ("", None):
                _put(labels, name.split("."), _value(cell, where), where)
    if not isinstance(labels, dict) or not labels:
        raise ConfigError(f"{where}: no right answer", hint=_HINT)
    return LabelRow(str(row.get("id") or where), str(row[place]), labels, file.parent, where)


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
