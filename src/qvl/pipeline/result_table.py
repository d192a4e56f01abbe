"""Results as a table: one row per picture, one column per field. The rules of all forms, from CSV to a Dataset.

A nested field is a column by its path (`attributes.color`, as in `field_confidence`). A box or a point has a column per
coordinate, in pixels of the original (`box.x1`), and `box.picture` where that is not the first, 0. A list is one cell:
a list where all rows have values of one kind in it, else JSON. Then come `confidence` and `confidence.FIELD` (0 to 1),
`raw_confidence` and `abstained.FIELD` with a calibration, `evidence.FIELD.x1`, `pages.FIELD` of documents, `notes`, and
`error`. The answer to a question, or a value without fields, is `answer`; what `locate` found is `located`. A name that
is taken becomes `qvl.NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from qvl.evidence.located import Locations
from qvl.evidence.shapes import SHAPES
from qvl.types import Result

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult
    from qvl.errors import QvlError
    from qvl.pipeline.map_in_order import MapItem

Kind: TypeAlias = Literal["text", "int", "float", "bool"]
Row: TypeAlias = "dict[str, object]"
_SHAPES: Final = [frozenset({*shape.names, "width", "height", "picture", "clipped"}) for shape in SHAPES.values()]
_COORDINATES: Final = {name for shape in SHAPES.values() for name in shape.names}
# Of the integers that a column of a table can hold.
_INT_LIMIT: Final = 2**63


@dataclass(frozen=True, slots=True)
class Column:
    """A column of one `kind`, or of lists of it; None where a row has no value."""

    name: str
    kind: Kind
    values: list[object]
    lists: bool = False


class ResultTable:
    """Rows of results, added as they come.

    Args:
        sources: with a column `source`: the path or URL of the picture, None for pictures in memory.
    """

    def __init__(self, *, sources: bool = True) -> None:
        self._sources = sources
        # Of each row the fields of its answer, and what is told beside them, which gives way where names collide.
        self._rows: list[tuple[Row, Row]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, item: MapItem[object]) -> None:
        """Add the row of one item of `map`."""
        before: Row = {"source": _named(item.source)} if self._sources else {}
        if item.error is not None:
            self._rows.append(({}, {**before, **_error(item.error)}))
            return
        fields, beside = _told(item)
        notes: Row = {"notes": list(item.result.notes)} if item.result is not None and item.result.notes else {}
        self._rows.append((fields, {**before, **beside, **notes}))

    def add_error(self, error: QvlError) -> None:
        """Add a row that no picture was asked for."""
        self._rows.append(({}, _error(error)))

    def columns(self, taken: Iterable[object] = ()) -> list[Column]:
        """Return the columns, in the order source, fields, what is told beside them, error; none is named as `taken`.

        A column without any value is text.
        """
        used = set(taken)
        names = [_names(row[part] for row in self._rows) for part in (0, 1)]
        first = ["source"] if self._sources else []
        fields = {name: _free(name, used) for name in names[0]}
        beside = {name: _free(name, used) for name in dict.fromkeys((*names[1], *first, "error"))}
        told = [_column(new, [row[0].get(name) for row in self._rows]) for name, new in fields.items()]
        rest = {name: _column(new, [row[1].get(name) for row in self._rows]) for name, new in beside.items()}
        source, error = ([rest.pop(name)] if name in rest else [] for name in ("source", "error"))
        return [*source, *told, *rest.values(), *error]


def _names(rows: Iterable[Row]) -> list[str]:
    """Return the names of all rows in the order of an answer; not of an object that no row lacks its fields for."""
    found: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = found.get(name, False) or value is not None
    parents = {name[:at] for name in found for at, letter in enumerate(name) if letter == "."}
    # Names of one object stand together, though a later row may have been the first to have one of them.
    heads = {head: at for at, head in enumerate(dict.fromkeys(name.partition(".")[0] for name in found))}
    kept = [name for name, has in found.items() if has or name not in parents]
    return sorted(kept, key=lambda name: heads[name.partition(".")[0]])


def _free(name: str, used: set[object]) -> str:
    while name in used:
        name = f"qvl.{name}"
    used.add(name)
    return name


def _error(error: QvlError) -> Row:
    return {"error": str(error)}


def _named(source: object) -> str | None:
    """Return the path or URL of a source, of several with commas between; None for what has no name."""
    if isinstance(source, list | tuple):
        names = [_named(one) for one in source]
        return ", ".join(name for name in names if name is not None) or None
    if isinstance(source, str | PathLike):
        name = fspath(source)
        return name if isinstance(name, str) and not name.startswith("data:") else None
    return None


def _told(item: MapItem[object]) -> tuple[Row, Row]:
    """Return the fields of an answer, and what is told beside them."""
    value = item.value
    if item.analysis is not None:
        return _fields(value), _beside(item.analysis)
    if isinstance(value, Result):
        return {"answer": value.text}, {}
    if isinstance(value, Locations):
        return {"located": [one.to_json() for one in value]}, {}
    return _fields(value), {}


def _fields(value: object) -> Row:
    from pydantic_core import to_jsonable_python

    from qvl.analysis.product import ProductAnalysis, ProductFields

    if isinstance(value, ProductAnalysis):
        value = value.model_dump(include=set(ProductFields.model_fields))
    plain = to_jsonable_python(_storable(value), inf_nan_mode="constants")
    return _flat(plain) if isinstance(plain, dict) else {"answer": plain}


def _beside(analysis: AnalysisResult[object]) -> Row:
    row: Row = {}
    for name, told in analysis.sureness().items():
        one = name.replace("field_", "")
        if isinstance(told, Mapping):
            row |= _under(one, told)
        elif one != "confidence_method":
            row[one] = told
    seen = {name: None if one is None else one.shape.to_json() for name, one in analysis.evidence.items()}
    return row | _flat(seen, "evidence.") | _under("pages", analysis.pages)


def _under(name: str, values: Mapping[str, object]) -> Row:
    # The confidence of a value without fields is that of the whole.
    return {f"{name}.{_storable(field)}" if field else name: value for field, value in values.items()}


def _flat(value: Mapping[str, object], start: str = "") -> Row:
    row: Row = {}
    for name, inner in value.items():
        path = f"{start}{name}"
        if not isinstance(inner, dict):
            told: Row = {path: inner}
        elif set(inner) - {"relative"} in _SHAPES:
            kept = [part for part in inner if part in _COORDINATES or (part == "picture" and inner[part])]
            told = {f"{path}.{part}": inner[part] for part in kept}
        else:
            told = _flat(inner, f"{path}.")
        # An object's name may have a dot in it, as if it were a path.
        for one, cell in told.items():
            row[_free(one, set(row))] = cell
    return row


def _column(name: str, values: list[object]) -> Column:
    given = [value for value in values if value is not None]
    kind = _kind(given)
    if kind is not None:
        return Column(name, kind, [_as(kind, value) for value in values])
    if all(isinstance(value, list) for value in given):
        inner = [one for value in given if isinstance(value, list) for one in value]
        kind = _kind(inner)
        if kind is not None and None not in inner:
            cells = [[_as(kind, one) for one in value] if isinstance(value, list) else None for value in values]
            return Column(name, kind, list(cells), lists=True)
    return Column(
        name, "text", [value if value is None or isinstance(value, str) else as_json(value) for value in values]
    )


def _kind(values: Iterable[object]) -> Kind | None:
    """Return the kind of all `values`, text of none; None if they are of several kinds, or lists or objects."""
    kinds = {type(value) for value in values}
    if not kinds or kinds == {str}:
        return "text"
    if kinds == {bool}:
        return "bool"
    fits = all(not isinstance(value, int) or -_INT_LIMIT <= value < _INT_LIMIT for value in values)
    if kinds == {int} and fits:
        return "int"
    return "float" if kinds <= {int, float} and fits else None


def _as(kind: Kind, value: object) -> object:
    if kind == "text":
        return _storable(value)
    return float(value) if kind == "float" and isinstance(value, int) else value


def _storable(value: object) -> object:
    """Return a value of JSON without lone halves of surrogate pairs, which no file and no frame can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(name): _storable(inner) for name, inner in value.items()}
    return [_storable(inner) for inner in value] if isinstance(value, list) else value


def as_json(value: object) -> str:
    """Return the JSON of a cell."""
    return json.dumps(value, ensure_ascii=False)
