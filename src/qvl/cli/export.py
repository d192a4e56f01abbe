"""`qvl export`: results with boxes as data sets of other tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure
from qvl.errors import ConfigError, write_failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qvl.evidence.export import ExportedSet


def export(
    results: Annotated[list[str], typer.Argument(help="JSON lines of qvl locate or qvl analyze; - is stdin.")],
    *,
    form: Annotated[str, typer.Option("--format", "-f", help="coco, yolo or label-studio.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write; for yolo a folder.")],
) -> None:
    """Write boxes as a data set: COCO's JSON, YOLO's folder of labels, or tasks for Label Studio.

    Boxes are in pixels of the upright picture, EXIF applied. Of several results of a picture the last one counts;
    pictures that failed are left out. Exit code: 0 done, 2 wrong use.
    """
    from qvl.evidence.export import FORMATS, ExportedSet, coco, label_config, label_studio, read_results, yolo

    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}", hint=f"one of {', '.join(FORMATS)}", param="format")
    data = ExportedSet()
    for name in results:
        _read(name, data, read_results)
    if not data.pictures:
        what = f"{data.failed} failed, {data.placeless} have neither a place nor the picture's size"
        raise ConfigError(f"no picture to export: {what}", hint="qvl locate … --output results.jsonl writes them")
    if data.points and form != "label-studio":
        what = f"{form} has boxes alone, and the results have {data.points} point{'' if data.points == 1 else 's'}"
        raise ConfigError(what, hint="--format label-studio takes points")
    if form == "yolo":
        files = yolo(data)
        _write_folder(output, files)
    elif form == "coco":
        _write(output, json.dumps(coco(data), ensure_ascii=False, indent=1))
    else:
        _write(output, json.dumps(label_studio(data), ensure_ascii=False, indent=1))
        _write(output.with_suffix(".xml"), label_config(data.labels))
    places = sum(len(picture.located) for picture in data.pictures.values())
    counts = (len(data.pictures), "picture"), (places, "place"), (len(data.labels), "label")
    told = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts)
    left = f", {data.failed + data.placeless} left out" if data.failed + data.placeless else ""
    failure.stderr().print(f"{told}{left}: {output}")


def _read(name: str, data: ExportedSet, read: Callable[[Iterable[str], str, ExportedSet], None]) -> None:
    if name == "-":
        read(sys.stdin, "stdin", data)
        return
    try:
        with open(name, encoding="utf-8") as lines:
            read(lines, name, data)
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not text"
        raise ConfigError(f"{name} cannot be read: {reason}", hint="JSON lines that qvl locate --output wrote") from exc


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise write_failed(f"--output {path}", exc) from exc


def _write_folder(folder: Path, files: dict[str, str]) -> None:
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise write_failed(f"--output {folder}", exc) from exc
