"""`analyze_frame` over frames of pandas and polars and over datasets of Hugging Face."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qvl
from qvl import ConfigError, Pipeline
from tests.pipeline.conftest import ANSWER, TalkingBackend

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


def brand_of(request: Any) -> str:
    """The first pixel's colour as the brand, so that an answer tells which picture it is of."""
    red = [Image.open(io.BytesIO(picture.data)).convert("RGB").getpixel((0, 0))[0] for picture in request.pictures]
    return json.dumps({**ANSWER, "brand": "+".join("red" if one else "blue" for one in red)})


@pytest.fixture
def pipe() -> Any:
    with Pipeline(backend=TalkingBackend(reply=brand_of), cache="off") as pipeline:
        yield pipeline


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("red", "blue")}


def test_pandas_keeps_index_order_and_columns_and_tells_errors(pipe: Pipeline, files: dict[str, str]) -> None:
    cells = [None, files["red"], float("nan"), pandas.NA, "lost.png", " ", files["blue"], pandas.NaT, []]
    frame = pandas.DataFrame({"n": range(9), "image": cells}, index=[3, 3, *"abcdefg"])
    frame.attrs["made"] = "by hand"
    told = qvl.analyze_frame(frame, "image", pipeline=pipe)
    assert list(told.index) == list(frame.index)
    assert told.attrs == frame.attrs
    assert list(told.columns)[:3] == ["n", "image", "brand"]
    assert list(frame.columns) == ["n", "image"]
    assert list(told["n"]) == list(range(9))
    assert [None if pandas.isna(cell) else cell for cell in told["brand"]] == [
        None, "red", None, None, None, None, "blue", None, None
    ]  # fmt: skip
    assert [row for row, error in enumerate(told["error"]) if error == "the row has no picture"] == [0, 2, 3, 5, 7, 8]
    assert "no such file" in told["error"].iloc[4]


def test_pictures_of_every_form(pipe: Pipeline, files: dict[str, str]) -> None:
    import numpy as np

    red, data = Image.open(files["red"]), Path(files["blue"]).read_bytes()
    cells = [red, data, np.asarray(red), {"bytes": data, "path": "x.png"}, {"bytes": None, "path": files["red"]}]
    cells += [[files["red"], files["blue"]], np.array([files["blue"], files["red"]], dtype=object), Path(files["red"])]
    told = qvl.analyze_frame(pandas.DataFrame({"image": pandas.Series(cells, dtype=object)}), "image", pipeline=pipe)
    assert list(told["error"].dropna()) == []
    assert list(told["brand"]) == ["red", "blue", "red", "blue", "red", "red+blue", "blue+red", "red"]


def test_polars(pipe: Pipeline, files: dict[str, str]) -> None:
    frame = polars.DataFrame({"image": [files["blue"], None, files["red"]], "brand": [1, 2, 3]})
    told = qvl.analyze_frame(frame, "image", pipeline=pipe)
    assert told["brand"].to_list() == [1, 2, 3]
    assert told["qvl.brand"].to_list() == ["blue", None, "red"]
    again = qvl.analyze_frame(told, "image", pipeline=pipe)
    assert again["qvl.qvl.brand"].to_list() == ["blue", None, "red"]
    lists = polars.DataFrame({"image": [[files["blue"], files["red"]], []]})
    assert qvl.analyze_frame(lists, "image", pipeline=pipe)["brand"].to_list() == ["blue+red", None]
    asked = qvl.analyze_frame(frame, "image", "Which?", pipeline=pipe)
    assert asked.columns == ["image", "brand", "answer", "error"]


def test_frames_without_rows_or_answers(pipe: Pipeline) -> None:
    for frame in (pandas.DataFrame({"image": []}), polars.DataFrame({"image": []})):
        assert list(qvl.analyze_frame(frame, "image", pipeline=pipe).columns) == ["image", "error"]
    none = qvl.analyze_frame(pandas.DataFrame({"image": [None, None]}), "image", pipeline=pipe)
    assert list(none["error"]) == ["the row has no picture"] * 2


@pytest.mark.parametrize(
    ("frame", "column", "message"),
    [
        (pandas.DataFrame({"image": []}), "imgae", "no column 'imgae'.*did you mean 'image'"),
        (pandas.DataFrame(), "image", "no columns"),
        (pandas.DataFrame([["a", "b"]], columns=["image", "image"]), "image", "2 columns named 'image'"),
        (pandas.DataFrame([["a"]], columns=pandas.MultiIndex.from_tuples([("a", "b")])), "a", "several levels"),
        (polars.DataFrame({"image": []}), "picture", "no column 'picture'"),
        (polars.LazyFrame({"image": []}), "image", "LazyFrame.*collect"),
        (pandas.Series(["a"]), "image", "Series.*to_frame"),
        ([{"image": "a"}], "image", "cannot take a list.*pandas or polars"),
    ],
)
def test_what_cannot_be_taken_is_refused(pipe: Pipeline, frame: object, column: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qvl.analyze_frame(frame, column, pipeline=pipe)


def test_a_whole_table_is_no_list_of_pictures_and_an_async_pipeline_is_no_pipeline(pipe: Pipeline) -> None:
    for table in (pandas.DataFrame({"image": []}), polars.DataFrame({"image": []}), polars.LazyFrame({"image": []})):
        with pytest.raises(ConfigError, match="analyze_frame"):
            list(pipe.map(table))
    frame: Any = pandas.DataFrame({"image": ["a.png"]})
    with pytest.raises(ConfigError, match=r"cannot use a AsyncPipeline.*a Pipeline"):
        qvl.analyze_frame(frame, "image", pipeline=pipe.pipeline)  # type: ignore[arg-type]


def test_columns_of_one_name_beside_the_pictures_stay(pipe: Pipeline, files: dict[str, str]) -> None:
    frame = pandas.DataFrame([[files["red"], 1, 2]], columns=["image", "n", "n"])
    told = qvl.analyze_frame(frame, "image", pipeline=pipe)
    assert list(told.columns)[:4] == ["image", "n", "n", "brand"]
    assert told.iloc[0, 1:4].tolist() == [1, 2, "red"]


@pytest.mark.slow
def test_datasets_in_and_out(pipe: Pipeline, files: dict[str, str], tmp_path: Path) -> None:
    import datasets

    rows = {"image": [files["red"], files["blue"], None], "n": [1, 2, 3]}
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    told = qvl.analyze_frame(whole.select([2, 1, 0]), "image", pipeline=pipe)
    assert told["brand"][:] == [None, "blue", "red"]
    assert told["n"][:] == [3, 2, 1]
    assert told["error"][0] == "the row has no picture"
    assert isinstance(told.features["image"], datasets.Image)
    # Kept with the pictures in it, one of them broken, as the hub has them.
    broken = [{"bytes": Path(files["red"]).read_bytes(), "path": "a.png"}, {"bytes": b"no picture", "path": "b.png"}]
    stored = datasets.Dataset.from_dict({"image": broken}).cast_column("image", datasets.Image())
    stored.to_parquet(tmp_path / "a.parquet")
    told = qvl.analyze_frame(stored, "image", pipeline=pipe)
    assert told["brand"][:] == ["red", None]
    assert told["error"][1]
    frame = qvl.analyze_frame(pandas.read_parquet(tmp_path / "a.parquet"), "image", pipeline=pipe)
    assert frame["brand"][0] == "red"
    # Rows as sources of map, and its results as a Dataset.
    assert pipe.map(whole.select([0, 1])["image"]).to_dataset()["brand"][:] == ["red", "blue"]
    for wrong, message in (
        (datasets.DatasetDict({"train": whole}), "DatasetDict.*split"),
        (whole.to_iterable_dataset(), "IterableDataset.*streams"),
    ):
        with pytest.raises(ConfigError, match=message):
            qvl.analyze_frame(wrong, "image", pipeline=pipe)
    with pytest.raises(ConfigError, match="analyze_frame"):
        list(pipe.map(whole))


@pytest.mark.slow
def test_the_bundled_model_reads_a_frame() -> None:
    names = ["norvik-mug-red.png", None, "shoe.webp"]
    frame = pandas.DataFrame({"image": [name and str(PICTURES / name) for name in names]})
    told = qvl.analyze_frame(frame, "image", cache="off", evidence=True)
    assert told["brand"][0] == "NORVIK"
    assert list(told["category"].dropna()) == ["mug", "shoe"]
    assert told["attributes.color"][0] == "red"
    assert told["evidence.brand.x1"][0] < told["evidence.brand.x2"][0]
    assert 0.5 < told["confidence.brand"][0] <= 1
    assert told["error"][1] == "the row has no picture"
