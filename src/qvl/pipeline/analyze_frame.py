"""`analyze_frame`: the pictures of a column of pandas, polars or Hugging Face's datasets; answers as columns beside."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, Unpack

from qvl.errors import ConfigError, MediaError
from qvl.pipeline import table_forms as forms
from qvl.pipeline.check_names import check_names_of_map
from qvl.pipeline.parse_request import MapParams
from qvl.pipeline.result_table import Column, ResultTable
from qvl.suggest import nearest

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.pipeline.sync_pipeline import Pipeline

F = TypeVar("F")
_FRAMES: Final = "a DataFrame of pandas or polars, or a datasets.Dataset"
# Rows of a Dataset that are in memory at a time.
_ROWS: Final = 64


def analyze_frame(
    frame: F,
    column: str,
    question: str | None = None,
    *,
    schema: SchemaLike | None = None,
    locate: str | Sequence[str] | None = None,
    points: bool = False,
    pipeline: Pipeline | None = None,
    **params: Unpack[MapParams],
) -> F:
    """Return a copy of `frame` with what `Pipeline.map` answers to the pictures of `column`, as columns beside its own.

    The columns are those of `map(...).to_pandas()`, without `source`; one whose name is taken is called `qvl.NAME`.
    Rows, their order and the index stay. `error` is the reason of a row that failed, or that has no picture; the others
    go on.

    Args:
        frame: a DataFrame of pandas or polars, or a Dataset of Hugging Face (its pictures are not decoded by it).
        column: of paths, URLs, bytes, PIL pictures, arrays, `{"bytes": …, "path": …}` as datasets keep them, or lists
            of these, shown together.
        pipeline: None opens `Pipeline()`, and closes it in the end.
        params: of `Pipeline.map`: `progress`, `concurrency`, `evidence`, `engine` and so on.

    Raises:
        ConfigError: another kind of frame or pipeline, no such column, or several of that name, or a parameter that
            `map` does not have.
    """
    from qvl.pipeline.sync_pipeline import Pipeline

    rows = _rows(frame, column)
    if pipeline is not None and not isinstance(pipeline, Pipeline):
        what = f"analyze_frame cannot use a {type(pipeline).__name__}"
        raise ConfigError(what, hint="a Pipeline, which works where a loop is running too", param="pipeline")
    names = MapParams.__annotations__
    check_names_of_map(params, names, question=question is not None, locate=locate is not None, verb="analyze_frame")
    table, cells = ResultTable(sources=False), _Cells(rows)
    wanted = {"question": question, "schema": schema, "locate": locate, "points": points, **params}
    with Pipeline() if pipeline is None else nullcontext(pipeline) as pipe:
        for item in pipe.map(cells, **wanted):  # type: ignore[call-overload]
            cells.leave_out(table, item.index)
            table.add(item)
    cells.leave_out(table)
    told: F = rows.beside(table)
    return told


class _Rows(Protocol):
    """The rows of one kind of frame."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[object]: ...

    def beside(self, table: ResultTable) -> Any:
        """Return the frame with the columns of the table beside its own."""


class _Cells:
    """The pictures of a column; rows without one are passed over, and told by `leave_out`."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        # By the number of the picture that comes next, how many rows before it have none.
        self._empty: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[object]:
        number = 0
        for cell in self._rows:
            source = _source(cell)
            if source is None:
                self._empty[number] = self._empty.get(number, 0) + 1
            else:
                yield source
                number += 1

    def leave_out(self, table: ResultTable, number: int | None = None) -> None:
        """Add the rows without a picture that stand before picture `number`; None adds all that are left."""
        for at in [number] if number is not None else list(self._empty):
            for _ in range(self._empty.pop(at, 0)):
                table.add_error(MediaError("the row has no picture"))


def _source(cell: object) -> Any:
    """Return the picture or pictures of a cell, None for an empty one."""
    if type(cell).__name__ == "ndarray" and str(getattr(cell, "dtype", None)) == "object":
        cell = list(cell)  # type: ignore[call-overload]  # a list, as pandas reads it from parquet
    if isinstance(cell, list | tuple):
        sources = [source for source in map(_source, cell) if source is not None]
        return sources or None
    if isinstance(cell, dict) and cell.keys() <= {"bytes", "path"}:
        return cell.get("bytes") or cell.get("path") or None
    if isinstance(cell, str):
        return cell if cell.strip() else None
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return None
    return None if isinstance(cell, float) and cell != cell else cell


def _rows(frame: object, column: str) -> _Rows:
    # Who has a frame has imported its package; nobody else waits for it.
    pandas, polars, datasets = (sys.modules.get(name) for name in ("pandas", "polars", "datasets"))
    if pandas is not None and isinstance(frame, pandas.DataFrame):
        return _OfPandas(frame, column)
    if polars is not None and isinstance(frame, polars.DataFrame):
        return _OfPolars(frame, column)
    if datasets is not None and isinstance(frame, datasets.Dataset):
        return _OfDataset(frame, column)
    hints = {
        "LazyFrame": "frame.collect()",
        "DatasetDict": "name a split: dataset['train']",
        "IterableDataset": "pipe.map(row['image'] for row in dataset), which takes streams",
        "Table": "polars.from_arrow(table)",
        "Series": "frame.to_frame(); or pipe.map(series).to_pandas()",
    }
    name = type(frame).__name__
    raise ConfigError(f"analyze_frame cannot take a {name}", hint=hints.get(name, _FRAMES), param="frame")


def _check(column: str, columns: Sequence[object]) -> None:
    found = list(columns).count(column)
    if found == 0:
        hint = nearest(str(column), map(str, columns)) if len(columns) else "the frame has no columns"
        raise ConfigError(f"the frame has no column {column!r}", hint=hint, param="column")
    if found > 1:
        what = f"the frame has {found} columns named {column!r}"
        raise ConfigError(what, hint="rename one: which has the pictures?", param="column")


class _OfPandas:
    def __init__(self, frame: Any, column: str) -> None:
        if frame.columns.nlevels > 1:
            hint = "frame.columns = frame.columns.map('.'.join)"
            raise ConfigError("the frame's columns have several levels", hint=hint, param="frame")
        _check(column, frame.columns)
        self._frame, self._column = frame, column

    def __len__(self) -> int:
        return len(self._frame)

    def __iter__(self) -> Iterator[object]:
        return iter(self._frame[self._column])

    def beside(self, table: ResultTable) -> Any:
        found = forms.to_pandas(table.columns(self._frame.columns), self._frame.index)
        whole = sys.modules["pandas"].concat([self._frame, found], axis=1)
        whole.attrs = dict(self._frame.attrs)
        return whole


class _OfPolars:
    def __init__(self, frame: Any, column: str) -> None:
        _check(column, frame.columns)
        self._frame, self._column = frame, column

    def __len__(self) -> int:
        return int(self._frame.height)

    def __iter__(self) -> Iterator[object]:
        return (cell.to_list() if type(cell).__name__ == "Series" else cell for cell in self._frame[self._column])

    def beside(self, table: ResultTable) -> Any:
        return self._frame.hstack(forms.to_polars(table.columns(self._frame.columns)).get_columns())


class _OfDataset:
    def __init__(self, frame: Any, column: str) -> None:
        _check(column, frame.column_names)
        self._frame, self._column = frame, column

    def __len__(self) -> int:
        return len(self._frame)

    def __iter__(self) -> Iterator[object]:
        # As they are stored: a broken picture is an error of its row, and good ones are decoded once, by the gate.
        stored = self._frame.select_columns([self._column]).with_format("arrow")
        for batch in stored.iter(batch_size=_ROWS):
            yield from batch[self._column].to_pylist()

    def beside(self, table: ResultTable) -> Any:
        columns: list[Column] = table.columns(self._frame.column_names)
        found = forms.to_dataset(columns)
        return sys.modules["datasets"].concatenate_datasets([self._frame, found], axis=1)
