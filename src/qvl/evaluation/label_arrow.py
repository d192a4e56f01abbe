"""Rows of parquet and Arrow files, with pictures in them, as Hugging Face's datasets write them. Needs pyarrow."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import ConfigError, MissingDependencyError
from qvl.suggest import install_line
from qvl.types import JsonObject

if TYPE_CHECKING:
    import pyarrow

ARROW: Final = (".parquet", ".arrow")
# Rows with pictures in them are large, and one batch of them is in memory.
_ROWS: Final = 64


def arrow_rows(file: Path) -> Iterator[JsonObject]:
    """Yield the rows of a file, null cells left out; class labels of datasets by their names.

    Raises:
        ConfigError: it cannot be read, or a cell is neither a JSON value nor a picture.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        what = f"{file.name} needs the package pyarrow"
        raise MissingDependencyError(what, hint=install_line("parquet")) from exc
    number = 0
    try:
        with file.open("rb") as opened:
            schema, batches = _opened(pyarrow, opened, file)
            names = _class_names(schema)
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield {
                        name: _plain(names[name][cell] if name in names else cell, f"{file.name}:{number}: {name!r}")
                        for name, cell in row.items()
                        if cell is not None
                    }
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror or exc}", hint="check the path") from exc
    except pyarrow.ArrowException as exc:
        reason = str(exc).splitlines()[0]
        raise ConfigError(f"{file} cannot be read: {reason}", hint="a parquet file, or one of save_to_disk") from exc


def _opened(pa: Any, opened: object, file: Path) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    if file.suffix.lower() == ".parquet":
        table = pa.parquet.ParquetFile(opened)
        return table.schema_arrow, table.iter_batches(_ROWS)
    stream = pa.ipc.open_stream(opened)
    parts = (batch.slice(start, _ROWS) for batch in stream for start in range(0, batch.num_rows, _ROWS))
    return stream.schema, parts


def _class_names(schema: pyarrow.Schema) -> Mapping[str, list[str]]:
    """Return the names behind the numbers of columns that datasets declares as ClassLabel."""
    told = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(told)["info"]["features"] if told else {}
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _plain(cell: object, where: str) -> object:
    """Return a cell without the nulls that a column of objects has for names that a row lacks."""
    if isinstance(cell, dict):
        return {name: _plain(inner, where) for name, inner in cell.items() if inner is not None}
    if isinstance(cell, list):
        return [_plain(inner, where) for inner in cell]
    if cell is None or isinstance(cell, str | bool | int | float | bytes):
        return cell
    raise ConfigError(f"{where} is a {type(cell).__name__}", hint="a text, number, truth value, list or object")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qvl-labels-")


def embedded(data: bytes, name: str) -> str:
    """Write a picture or video that a table holds to a file that lives as long as the process; return its path."""
    path = Path(_folder().name) / f"{hashlib.sha256(data).hexdigest()[:32]}{Path(name).suffix}"
    if not path.exists():
        path.write_bytes(data)
    return str(path)
