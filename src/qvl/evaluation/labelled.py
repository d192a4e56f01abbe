"""Labelled pictures: JSON lines in the forms of `qvl.bench.dataset`, each with the right answer in `expected`.

    {"image": "shelf/17.jpg", "expected": {"brand": "NORVIK", "attributes": {"color": "red"}}}
    {"images": ["front.jpg", "back.jpg"], "id": "sku-18", "expected": {"brand": null, "Is it new?": true}}

`expected` is an object. A name in it that is a question's is the right value of that question; everything else is a
part of the right analysis, in the form of the schema. What is left out is not compared. Paths of pictures are relative
to the file; texts and messages of a line are not used. A video stands in `video` or wherever a picture may. CSV and
parquet files and folders of data sets: `label_tables`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qvl.bench.dataset import BadLine, Files
from qvl.bench.line_forms import PICTURE_KEYS
from qvl.errors import ConfigError
from qvl.evaluation.label_tables import is_table, read_table
from qvl.types import JsonObject

_REMOTE: Final = ("http://", "https://", "data:")
_MEDIA: Final = (*PICTURE_KEYS, "video", "video_path", "video_url")
_FORM: Final = '{"image": "a.png", "expected": {"brand": "NORVIK"}}'


@dataclass(frozen=True, slots=True)
class Labelled:
    """One line: the pictures and videos of one request (paths, http(s) or data: URLs) and the right answer."""

    id: str
    pictures: tuple[str, ...]
    expected: JsonObject
    where: str


def read_labelled(patterns: Sequence[str]) -> list[Labelled]:
    """Return the lines of the files, globs and folders `patterns`, in order; tables behind JSON lines.

    Raises:
        ConfigError: no file, no line, or a line that is no labelled picture; the line is named.
    """
    found: list[Labelled] = []
    seen: dict[str, str] = {}
    tables = [pattern for pattern in patterns if is_table(pattern)]
    plain = [pattern for pattern in patterns if pattern not in tables]
    for item in _items(plain) if plain else ():
        pictures = tuple(_picture(part["image_url"]["url"], item.base, item.where) for part in item.picture_parts())
        if not pictures:
            raise _fault(item.where, "no picture", _FORM)
        if not isinstance(item.expected, dict) or not item.expected:
            if item.expected is None:
                meant = difflib.get_close_matches("expected", item.names, n=1)
                raise _fault(item.where, "no right answer in `expected`", _meant(meant[0]) if meant else _FORM)
            raise _fault(item.where, "`expected` must be an object", _FORM)
        found.append(Labelled(item.id, pictures, item.expected, item.where))
    for row in (row for table in tables for row in read_table(table)):
        pictures = tuple(_picture(source, row.base, row.where) for source in row.pictures)
        found.append(Labelled(row.id, pictures, row.expected, row.where))
    for line in found:
        _check_numbers(line.expected, line.where, "expected")
        if line.id in seen:
            raise _fault(line.where, f"the id {line.id!r} stands in {seen[line.id]} too", "each line needs its own")
        seen[line.id] = line.where
    if not found:
        raise ConfigError(f"no labelled picture in {', '.join(patterns)}", hint=_FORM)
    return found


def _items(patterns: Sequence[str]) -> Files:
    try:
        return Files(patterns, media=_MEDIA, on_bad=_refuse)
    except ConfigError as exc:
        raise ConfigError(exc.message, hint=f"name a file of labels: {_FORM}") from exc


def _meant(name: str) -> str:
    return f"did you mean `expected` by {name!r}?"


def _refuse(bad: BadLine) -> None:
    raise _fault(bad.where, bad.reason, _FORM)


def _fault(where: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"{where}: {what}", hint=hint)


def _picture(source: str, base: Path | None, where: str) -> str:
    if source.startswith(_REMOTE):
        return source
    path = (base or Path()) / source
    if not path.is_file():
        raise _fault(where, f"no picture {path}", "paths are relative to the file of labels")
    return str(path)


def _check_numbers(value: object, where: str, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _fault(where, f"{path} is {value}", "a number, a text, true, false or null")
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(inner, where, f"{path}.{name}")
