"""What `map` returns: a generator of items that can also be read to its end into a table."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from qvl.pipeline import table_forms as forms
from qvl.pipeline.map_in_order import MapItem
from qvl.pipeline.result_table import Column, ResultTable

if TYPE_CHECKING:
    from os import PathLike

    import datasets
    import pandas
    import polars

T_co = TypeVar("T_co", covariant=True)


def _raised(
    typ: type[BaseException] | BaseException, val: BaseException | object, tb: TracebackType | None
) -> BaseException:
    """Return the exception of the three arguments that a generator's `throw` still takes."""
    raised = typ if isinstance(typ, BaseException) else val if isinstance(val, BaseException) else typ()
    return raised if tb is None else raised.with_traceback(tb)


class MapResults(Generator[MapItem[T_co], None, None]):
    """The items of a `map`, in input order, as they come.

    `to_pandas()`, `to_polars()`, `to_dataset()`, `to_parquet()` and `to_csv()` read the items that are left: a row per
    picture, a column per field (`attributes.color`), `confidence.FIELD`, and `error` of a picture that failed. What a
    form needs (the extra `data`; CSV nothing) and the path of a file are checked before the first picture.
    """

    def __init__(self, items: Generator[MapItem[T_co], None, None]) -> None:
        self._items = items

    def send(self, value: None) -> MapItem[T_co]:
        return self._items.send(value)

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> MapItem[T_co]:
        return self._items.throw(_raised(typ, val, tb))

    def close(self) -> None:
        self._items.close()

    def to_pandas(self) -> pandas.DataFrame:
        """Return the items that are left as a pandas DataFrame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        forms.needed("pandas", "to_pandas")
        return forms.to_pandas(self._columns())

    def to_polars(self) -> polars.DataFrame:
        """Return the items that are left as a polars DataFrame.

        Raises:
            MissingDependencyError: polars is not installed.
        """
        forms.needed("polars", "to_polars")
        return forms.to_polars(self._columns())

    def to_dataset(self) -> datasets.Dataset:
        """Return the items that are left as a Dataset of Hugging Face.

        Raises:
            MissingDependencyError: datasets is not installed.
        """
        forms.needed("datasets", "to_dataset")
        return forms.to_dataset(self._columns())

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Write the items that are left to a parquet file.

        Raises:
            MissingDependencyError: pyarrow is not installed.
            ConfigError: the file cannot be written.
        """
        forms.needed("pyarrow.parquet", "to_parquet")
        file = forms.writable(path)
        forms.write_parquet(self._columns(), file)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the items that are left to a CSV file: lists as JSON, an apostrophe before what looks like a formula.

        Raises:
            ConfigError: the file cannot be written.
        """
        file = forms.writable(path)
        forms.write_csv(self._columns(), file)

    def _columns(self) -> list[Column]:
        table = ResultTable()
        for item in self:
            table.add(item)
        return table.columns()


class AsyncMapResults(AsyncGenerator[MapItem[T_co], None]):
    """The items of a `map`, as `MapResults`; the methods that make a table are awaited."""

    def __init__(self, items: AsyncGenerator[MapItem[T_co], None]) -> None:
        self._items = items

    async def asend(self, value: None) -> MapItem[T_co]:
        return await self._items.asend(value)

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> MapItem[T_co]:
        return await self._items.athrow(_raised(typ, val, tb))

    async def aclose(self) -> None:
        await self._items.aclose()

    async def to_pandas(self) -> pandas.DataFrame:
        forms.needed("pandas", "to_pandas")
        return forms.to_pandas(await self._columns())

    async def to_polars(self) -> polars.DataFrame:
        forms.needed("polars", "to_polars")
        return forms.to_polars(await self._columns())

    async def to_dataset(self) -> datasets.Dataset:
        forms.needed("datasets", "to_dataset")
        return forms.to_dataset(await self._columns())

    async def to_parquet(self, path: str | PathLike[str]) -> None:
        forms.needed("pyarrow.parquet", "to_parquet")
        file = forms.writable(path)
        forms.write_parquet(await self._columns(), file)

    async def to_csv(self, path: str | PathLike[str]) -> None:
        file = forms.writable(path)
        forms.write_csv(await self._columns(), file)

    async def _columns(self) -> list[Column]:
        table = ResultTable()
        async for item in self:
            table.add(item)
        return table.columns()


for _name in ("to_pandas", "to_polars", "to_dataset", "to_parquet", "to_csv"):
    getattr(AsyncMapResults, _name).__doc__ = getattr(MapResults, _name).__doc__
