"""Results of `map` as tables: the columns, their kinds, and each form of them."""

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel

from qvl import AnalysisResult, AsyncPipeline, Box, ConfigError, Located, MapItem, MapResults, Pipeline, Result
from qvl.pipeline.result_table import ResultTable
from tests.pipeline.conftest import ANSWER, TalkingBackend


class Street(BaseModel):
    name: str
    number: int | None = None


class Shop(BaseModel):
    brand: str
    tags: list[str] = []
    street: Street | None = None
    lines: list[Street] = []
    price: float | None = None
    error: str = "none"


FULL = {
    "brand": "A",
    "tags": ["x", "y"],
    "street": {"name": "Elm", "number": 3},
    "lines": [{"name": "Oak"}],
    "price": 2,
}
BARE = {"brand": "=B+1", "tags": [], "street": None, "error": "odd"}


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A red picture, one that does not exist, and a blue one."""
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    return [str(tmp_path / name) for name in ("red.png", "lost.png", "blue.png")]


def shops() -> Pipeline:
    def reply(request: Any) -> str:
        return json.dumps(FULL if request.pictures[0].source.endswith("red.png") else BARE)

    return Pipeline(backend=TalkingBackend(reply=reply), cache="memory:")


def columns_of(*values: object) -> dict[str, tuple[str, list[object]]]:
    table = ResultTable()
    for index, value in enumerate(values):
        table.add(MapItem(index, "a.png", value))
    return {one.name: (f"{one.kind}s" if one.lists else one.kind, one.values) for one in table.columns()}


@pytest.mark.parametrize(
    ("values", "kind", "told"),
    [
        ([1, None, 2], "int", [1, None, 2]),
        ([1, 2.5], "float", [1.0, 2.5]),
        ([True, None], "bool", [True, None]),
        ([True, 1], "text", ["true", "1"]),
        ([2**80, 1], "text", [str(2**80), "1"]),
        ([["a", {"b": 2}], 1], "text", ['["a", {"b": 2}]', "1"]),
        ([["a"], None, []], "texts", [["a"], None, []]),
        ([[1], [0.5]], "floats", [[1.0], [0.5]]),
        ([["a"], [1]], "text", ['["a"]', "[1]"]),
        ([["é"], "b"], "text", ['["é"]', "b"]),
        ([[None, "a"]], "text", ['[null, "a"]']),
        ([[[1, 2]]], "text", ["[[1, 2]]"]),
        ([None], "text", [None]),
    ],
)
def test_a_column_is_of_one_kind(values: list[object], kind: str, told: list[object]) -> None:
    assert columns_of(*({"it": value} for value in values))["it"] == (kind, told)


def test_nested_fields_are_paths_and_an_absent_object_is_no_column() -> None:
    told = columns_of({"a": None, "b": {}}, {"a": {"b": {"c": 1}, "d": "x"}, "a.d": "y"})
    assert list(told) == ["source", "a.b.c", "a.d", "qvl.a.d", "error"]
    assert told["a.b.c"][1] == [None, 1]
    assert told["qvl.a.d"][1] == [None, "y"]


def test_calibrated_confidences_abstentions_evidence_and_pages_stand_beside() -> None:
    box = Located("brand", box=Box(1, 2, 3, 4, 10, 10))
    analysis: AnalysisResult[object] = AnalysisResult(
        {"brand": None, "total": 3},
        Result((), notes=("odd",)),
        confidence=0.9,
        field_confidence={"brand": 0.4},
        confidence_method="calibrated",
        raw_confidence=0.8,
        raw_field_confidence={"brand": 0.3},
        abstained={"brand": "0.4 is less than 0.6"},
        evidence={"brand": box, "total": None},
        pages={"total": 2},
    )
    table = ResultTable(sources=False)
    table.add(MapItem(0, "a.pdf", analysis.value, analysis.result, analysis=analysis))
    assert {one.name: one.values[0] for one in table.columns()} == {
        "brand": None, "total": 3, "confidence": 0.9, "confidence.brand": 0.4, "raw_confidence": 0.8,
        "raw_confidence.brand": 0.3, "abstained.brand": "0.4 is less than 0.6", "evidence.brand.x1": 1,
        "evidence.brand.y1": 2, "evidence.brand.x2": 3, "evidence.brand.y2": 4, "evidence.total": None,
        "pages.total": 2, "notes": ["odd"], "error": None,
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(analysis)) == analysis


def test_half_of_a_surrogate_pair_ends_no_run() -> None:
    told = columns_of({"\ud800a": "x\udc00", "l": ["\ud800"], "o": [{"\ud800": 1}]})
    assert {name: cells[0] for name, (_, cells) in told.items()} == {
        "source": "a.png", "?a": "x?", "l": ["?"], "o": '[{"?": 1}]', "error": None
    }  # fmt: skip


def test_boxes_are_their_coordinates() -> None:
    told = columns_of({"at": Box(1, 2, 3, 4, 10, 10)}, {"at": Box(1, 2, 3, 5, 10, 10, 1)})
    assert {name: cells for name, (_, cells) in told.items() if name.startswith("at")} == {
        "at.x1": [1, 1], "at.y1": [2, 2], "at.x2": [3, 3], "at.y2": [4, 5], "at.picture": [None, 1]
    }  # fmt: skip


def test_pandas(two: list[str]) -> None:
    with shops() as pipe:
        frame = pipe.map(two, schema=Shop).to_pandas()
    assert list(frame["source"]) == two
    assert list(frame["brand"].dropna()) == ["A", "=B+1"]
    assert frame["tags"][0] == ["x", "y"]
    assert frame["street.number"].dtype == "Int64"
    assert frame["street.number"][0] == 3
    assert frame["price"][0] == 2.0
    # A field of the schema keeps its name, and ours gives way.
    assert list(frame["error"].dropna()) == ["none", "odd"]
    assert "no such file" in frame["qvl.error"][1]
    assert 0 < frame["confidence.brand"][0] <= 1
    assert "raw_confidence" not in frame


def test_polars_arrow_and_csv_tell_the_same(two: list[str], tmp_path: Path) -> None:
    import polars
    import pyarrow.parquet

    with shops() as pipe:
        frame = pipe.map(two, schema=Shop).to_polars()
        pipe.map(two, schema=Shop).to_parquet(tmp_path / "a.parquet")
        pipe.map(two, schema=Shop).to_csv(str(tmp_path / "a.csv"))
    assert frame.schema["tags"] == polars.List(polars.String)
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist() == frame.to_dicts()
    with (tmp_path / "a.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["brand"] for row in rows] == ["A", "", "'=B+1"]
    assert [row["tags"] for row in rows] == ['["x", "y"]', "", "[]"]
    assert [row["lines"] for row in rows] == ['[{"name": "Oak", "number": null}]', "", "[]"]
    assert "no such file" in rows[1]["qvl.error"]


def test_answers_and_places(two: list[str]) -> None:
    located = json.dumps([{"bbox_2d": [0, 0, 500, 500], "label": "dot"}])
    with Pipeline(backend=TalkingBackend(reply=lambda request: "It is red."), cache="off") as pipe:
        assert pipe.map(two[:1], "What?").to_polars().rows() == [(two[0], "It is red.", None)]
    with Pipeline(backend=TalkingBackend(reply=lambda request: located), cache="off") as pipe:
        frame = pipe.map(two[:1], locate="dot").to_polars()
    assert json.loads(frame["located"][0])[0]["box"]["x2"] == 32.0


@pytest.mark.asyncio
async def test_async_results_are_awaited(two: list[str], tmp_path: Path) -> None:
    async with AsyncPipeline(backend=TalkingBackend(reply=lambda request: json.dumps(ANSWER)), cache="memory:") as pipe:
        assert (await pipe.map(two).to_polars()).height == 3
        items = pipe.map(two)
        assert (await anext(items)).ok
        await items.to_csv(tmp_path / "rest.csv")
        assert len((tmp_path / "rest.csv").read_text().splitlines()) == 3
        stopped = pipe.map(two)
        assert (await anext(stopped)).ok
        await stopped.aclose()
        assert [item async for item in stopped] == []


def test_it_is_a_generator_still_and_a_table_is_of_what_is_left(two: list[str]) -> None:
    with shops() as pipe:
        items = pipe.map(two, schema=Shop)
        assert isinstance(items, MapResults)
        first = next(items)
        assert first.analysis is not None
        assert first.analysis.field_confidence.keys() >= {"brand"}
        assert len(items.to_polars()) == 2
        assert list(items) == []
        stopped = pipe.map(two, schema=Shop)
        next(stopped)
        stopped.close()
        assert list(stopped) == []
        assert pipe.map([]).to_polars().columns == ["source", "error"]


def test_a_file_that_cannot_be_written_is_told_before_the_first_picture(two: list[str], tmp_path: Path) -> None:
    backend = TalkingBackend(reply=lambda request: json.dumps(ANSWER))
    with Pipeline(backend=backend, cache="off") as pipe:
        for path, what in ((tmp_path / "no" / "a.csv", "no folder"), (tmp_path, "is a folder")):
            with pytest.raises(ConfigError, match=what):
                pipe.map(two).to_csv(path)
            with pytest.raises(ConfigError, match=what):
                pipe.map(two).to_parquet(path)
        with pytest.raises(ConfigError, match="NoneType is not a path"):
            pipe.map(two).to_csv(None)  # type: ignore[arg-type]
    assert backend.requests == []


def test_an_absent_package_is_named_with_the_extra_and_csv_needs_none(two: list[str], tmp_path: Path) -> None:
    code = """
import sys
for absent in ("pandas", "polars", "pyarrow", "datasets"):
    sys.modules[absent] = None
from qvl import MissingDependencyError, Pipeline
pipe = Pipeline("openai:none", base_url="http://127.0.0.1:9/v1", cache="off")
for name, arguments in (("to_pandas", ()), ("to_polars", ()), ("to_dataset", ()), ("to_parquet", ("a.parquet",))):
    try:
        getattr(pipe.map(sys.argv[1:]), name)(*arguments)
    except MissingDependencyError as exc:
        print(name, exc)
pipe.map(["lost.png"]).to_csv("a.csv")
"""
    run = [sys.executable, "-c", code, two[0]]
    told = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert [line.split(" ")[0] for line in told] == ["to_pandas", "to_polars", "to_dataset", "to_parquet"]
    assert all("needs the package" in line and "[data]'" in line for line in told), told
    assert "lost.png" in (tmp_path / "a.csv").read_text()
