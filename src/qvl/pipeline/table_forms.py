"""A table of results as a frame, a file or a Dataset. The packages are optional, the extra `data`; CSV needs none."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.config import in_home
from qvl.errors import ConfigError, MissingDependencyError
from qvl.pipeline.result_table import Column, as_json
from qvl.suggest import install_line

if TYPE_CHECKING:
    import datasets
    import pandas
    import polars
    import pyarrow

# Columns of pandas that can lack values and stay what they are.
_NULLABLE: Final = {"int": "Int64", "bool": "boolean", "float": "float64"}
_ARROW: Final = {"text": "string", "int": "int64", "float": "float64", "bool": "bool_"}
_POLARS: Final = {"text": "String", "int": "Int64", "float": "Float64", "bool": "Boolean"}
# With what a spreadsheet takes a text for a formula.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def needed(package: str, what: str) -> Any:
    """Return the module of an optional package.

    Raises:
        MissingDependencyError: it, or what it needs, is not installed.
    """
    try:
        return import_module(package)
    except ImportError as exc:
        message = f"{what} needs the package {exc.name or package}"
        raise MissingDependencyError(message, hint=install_line("data")) from exc


def is_table(value: object) -> bool:
    """True for a whole table or data set of pandas, polars or datasets, whose pictures are in one of its columns."""
    # Who has one has imported its package; nobody else waits for it.
    kinds = {"pandas": ("DataFrame",), "polars": ("DataFrame", "LazyFrame"), "datasets": ("Dataset", "DatasetDict")}
    loaded = {package: module for package in kinds if (module := sys.modules.get(package)) is not None}
    return any(isinstance(value, getattr(loaded[package], name)) for package in loaded for name in kinds[package])


def writable(path: str | PathLike[str]) -> Path:
    """Return the path of a file to be written.

    Raises:
        ConfigError: it is a folder, or in a folder that does not exist; told before hours of work, not after.
    """
    if not isinstance(path, str | PathLike):
        raise ConfigError(f"a {type(path).__name__} is not a path", hint="name a file")
    file = in_home(path)
    if file.is_dir():
        raise ConfigError(f"{file} is a folder", hint="name a file")
    if not file.parent.is_dir():
        raise ConfigError(
            f"{file} cannot be written: there is no folder {file.parent}", hint="make it, or check the path"
        )
    return file


def to_pandas(columns: Sequence[Column], index: object = None) -> pandas.DataFrame:
    """Return a DataFrame with one row per item; whole numbers and truth values stay so where some are missing."""
    pd = needed("pandas", "to_pandas")
    series = {}
    for column in columns:
        empty = not any(value is not None for value in column.values)
        # Texts are told by their values, since older versions make a text of None where they are told so.
        dtype = "object" if column.lists or empty else _NULLABLE.get(column.kind)
        if dtype in ("Int64", "boolean") and None not in column.values:
            dtype = {"Int64": "int64", "boolean": "bool"}[dtype]
        series[column.name] = pd.Series(column.values, index=index, dtype=dtype)
    return pd.DataFrame(series, index=index)


def to_polars(columns: Sequence[Column]) -> polars.DataFrame:
    """Return a DataFrame with one row per item."""
    pl = needed("polars", "to_polars")
    kinds = {}
    for column in columns:
        kind = getattr(pl, _POLARS[column.kind])
        kinds[column.name] = pl.List(kind) if column.lists else kind
    return pl.DataFrame({column.name: column.values for column in columns}, schema=kinds)


def to_arrow(columns: Sequence[Column], what: str = "to_parquet") -> pyarrow.Table:
    """Return a pyarrow Table with one row per item; `what` needs it."""
    pa = needed("pyarrow", what)
    arrays = {}
    for column in columns:
        kind = getattr(pa, _ARROW[column.kind])()
        arrays[column.name] = pa.array(column.values, pa.list_(kind) if column.lists else kind)
    return pa.table(arrays)


def to_dataset(columns: Sequence[Column]) -> datasets.Dataset:
    """Return a Dataset of Hugging Face with one row per item."""
    return needed("datasets", "to_dataset").Dataset(to_arrow(columns, "to_dataset"))


def write_parquet(columns: Sequence[Column], file: Path) -> None:
    parquet = needed("pyarrow.parquet", "to_parquet")
    try:
        parquet.write_table(to_arrow(columns), str(file))
    except OSError as exc:
        raise ConfigError(f"{file} cannot be written: {exc.strerror or exc}", hint="check the path") from exc


def write_csv(columns: Sequence[Column], file: Path) -> None:
    """Write UTF-8 with a header; lists as JSON, truth values as true and false, nothing for what is missing.

    A text that a spreadsheet would run as a formula begins with an apostrophe, as in the page's CSV.
    """
    try:
        with file.open("w", encoding="utf-8", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerow([_cell(column.name) for column in columns])
            rows.writerows([_cell(cell) for cell in row] for row in zip(*(one.values for one in columns), strict=True))
    except OSError as exc:
        raise ConfigError(f"{file} cannot be written: {exc.strerror or exc}", hint="check the path") from exc


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return as_json(value)
    return f"'{value}" if value.startswith(_FORMULA) and not _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
