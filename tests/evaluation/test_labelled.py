"""Labelled pictures: the forms of bench's lines, and one clear line for each that cannot be used."""

from __future__ import annotations

import io
import json
import sys
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from qvl.errors import ConfigError, MissingDependencyError
from qvl.evaluation.labelled import read_labelled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, *lines: object) -> str:
    file = folder / "labels.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


def test_a_line_is_pictures_and_the_right_answer(folder: Path) -> None:
    file = write(
        folder,
        {"image": "a.png", "expected": {"brand": "NORVIK"}},
        {"images": ["a.png", "https://example.org/b.png"], "id": "two", "expected": {"brand": None}},
        "",
        {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "b.png"}}]}],
            "expected": {"x": 1},
        },
    )
    one, two, three = read_labelled([file])
    assert (one.pictures, one.expected, one.id) == ((str(folder / "a.png"),), {"brand": "NORVIK"}, "labels.jsonl:1")
    assert (two.id, two.pictures) == ("two", (str(folder / "a.png"), "https://example.org/b.png"))
    assert three.pictures == (str(folder / "b.png"),)
    assert three.where == f"{file}:4"


def test_the_labels_of_the_examples_are_read() -> None:
    examples = Path(__file__).parents[2] / "examples" / "pictures" / "labels.jsonl"
    assert read_labelled([str(examples)])[0].expected["brand"] == "NORVIK"


GOOD = {"image": "a.png", "id": "1", "expected": {"brand": "NORVIK"}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "labels.jsonl:2: invalid JSON"),
        ("[1, 2]", "labels.jsonl:2: a message must be an object"),
        ('{"image": "a.png", "expected": {"price": NaN}}', "labels.jsonl:2: expected.price is nan"),
        ('{"image": "a.png", "expected": {"a": [1, {"b": -Infinity}]}}', "labels.jsonl:2: expected.a.1.b is -inf"),
        ({"image": "a.png"}, "labels.jsonl:2: no right answer in `expected`"),
        ({"image": "a.png", "expected": {}}, "labels.jsonl:2: `expected` must be an object"),
        ({"image": "a.png", "expected": "NORVIK"}, "labels.jsonl:2: `expected` must be an object"),
        ({"prompt": "What?", "expected": {"a": 1}}, "labels.jsonl:2: no picture"),
        ({"image": "lost.png", "expected": {"a": 1}}, "labels.jsonl:2: no picture .*lost.png"),
        ({**GOOD, "id": 1}, "labels.jsonl:2: the id '1' stands in .*labels.jsonl:1 too"),
    ],
)
def test_a_line_that_is_no_labelled_picture_is_named(folder: Path, line: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_labelled([write(folder, GOOD, line)])
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_no_file_and_no_line_are_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        read_labelled([str(folder / "none.jsonl")])
    with pytest.raises(ConfigError, match="no labelled picture in"):
        read_labelled([write(folder)])


def test_rows_of_tables_are_lines(folder: Path) -> None:
    table = folder / "labels.csv"
    head = "image,id,brand,attributes.color,tags,Is it new?"
    table.write_text(f'{head}\na.png,one,NORVIK,red,"[""x"", ""y""]",true\nb.png,,,blue,,\n')
    one, two = read_labelled([str(table)])
    assert one.expected == {"brand": "NORVIK", "attributes": {"color": "red"}, "tags": ["x", "y"], "Is it new?": True}
    assert (one.id, one.pictures) == ("one", (str(folder / "a.png"),))
    assert (two.id, two.expected) == ("labels.csv:3", {"attributes": {"color": "blue"}})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_a_data_set_is_read(folder: Path, kind: str) -> None:
    inner = folder / "set" / "train"
    inner.mkdir(parents=True)
    (folder / "a.png").rename(inner / "a.png")
    text = 'file_name,expected\na.png,"{""brand"": null}"\n'
    if kind == "jsonl":
        text = '{"file_name": "a.png", "expected": {"brand": null}}\n'
    (inner / f"metadata.{kind}").write_text(text)
    (line,) = read_labelled([str(folder / "set")])
    assert (line.pictures, line.expected) == ((str(inner / "a.png"),), {"brand": None})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("image,brand\n,NORVIK\n", "labels.csv:2: no picture"),
        ("image,brand\na.png,\n", "labels.csv:2: no right answer"),
        ("image,expected\na.png,{x\n", "is not JSON"),
        ("image,a,a.b\na.png,x,y\n", "is a label and has labels in it"),
        ("image,brand\nc.png,x\n", "no picture"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder: Path, text: str, wrong: str) -> None:
    table = folder / "labels.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        read_labelled([str(table)])


def test_a_folder_without_labels_is_refused_and_one_of_json_lines_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        read_labelled([str(folder)])
    write(folder, GOOD)
    assert len(read_labelled([str(folder)])) == 1


def test_splits_of_one_name_are_told_apart_and_globs_read(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        Image.new("RGB", (40, 40)).save(folder / split / "a.png")
        (folder / split / "metadata.csv").write_text("file_name,brand\na.png,NORVIK\n")
    assert [line.id for line in read_labelled([str(folder)])] == ["test/metadata.csv:2", "train/metadata.csv:2"]
    assert [line.id for line in read_labelled([str(folder / "tr*" / "*.csv")])] == ["metadata.csv:2"]
    with pytest.raises(ConfigError, match="no such file"):
        read_labelled([str(folder / "*.csv")])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("image,brand\na.png,NORVIK,red\n", "labels.csv:2: more cells than columns"),
        ("image,brand,brand\na.png,NORVIK,red\n", "'brand' stands there twice"),
        ('image,expected\na.png,"NORVIK"\n', "must be an object"),
        ('image,brand\na.png,"NOR\n', "cannot be read"),
    ],
)
def test_a_table_that_is_not_well_formed_is_refused(folder: Path, text: str, wrong: str) -> None:
    table = folder / "labels.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        read_labelled([str(table)])


def test_a_video_stands_in_a_column_of_its_own(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(b"any")
    (line,) = read_labelled([write(folder, {"video": "clip.mp4", "expected": {"brand": "NORVIK"}})])
    assert line.pictures == (str(folder / "clip.mp4"),)
    (folder / "metadata.csv").write_text("file_name,brand\nclip.mp4,NORVIK\n")
    (line,) = read_labelled([str(folder)])
    assert line.pictures == (str(folder / "clip.mp4"),)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


def dataset_table() -> pyarrow.Table:
    """As Hugging Face's datasets write it: pictures inside, class labels as numbers with their names in the schema."""
    features = {"image": {"_type": "Image"}, "state": {"names": ["new", "used"], "_type": "ClassLabel"}}
    rows = [
        {
            "image": {"bytes": png(colour), "path": f"{colour}.png"},
            "state": number % 2,
            "brand": None if number else "NORVIK",
            "attributes": {"color": colour, "size": None},
            "tags": ["x", "y"],
        }
        for number, colour in enumerate(("red", "blue", "green"))
    ]
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pyarrow.Table.from_pylist(rows)
    return table.replace_schema_metadata(told)


@pytest.mark.parametrize("kind", ["file", "shards", "saved"])
def test_pictures_in_a_table_are_read(tmp_path: Path, kind: str) -> None:
    table = dataset_table()
    named = tmp_path
    if kind == "saved":
        (tmp_path / "train").mkdir()
        path = tmp_path / "train" / "data-00000-of-00001.arrow"
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        (tmp_path / "data").mkdir()
        path = tmp_path / "data" / "train-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path)
        named = path if kind == "file" else tmp_path
    one, two, three = read_labelled([str(named)])
    assert one.expected == {"brand": "NORVIK", "attributes": {"color": "red"}, "tags": ["x", "y"], "state": "new"}
    # A null cell is no label.
    assert two.expected == {"attributes": {"color": "blue"}, "tags": ["x", "y"], "state": "used"}
    assert one.id == (path.name if kind == "file" else str(path.relative_to(tmp_path))) + ":1"
    with Image.open(three.pictures[0]) as image:
        assert image.getpixel((0, 0)) == (0, 128, 0)


def test_metadata_may_be_parquet_and_labels_an_object_as_json(folder: Path) -> None:
    rows = [{"file_name": "a.png", "id": "one", "expected": '{"brand": null}'}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    (line,) = read_labelled([str(folder)])
    assert (line.id, line.expected, line.pictures) == ("one", {"brand": None}, (str(folder / "a.png"),))


def test_a_table_that_cannot_be_read_is_told_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "labels.parquet"
    for data, wrong in ((b"no parquet", "cannot be read"), (b"", "cannot be read")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=wrong) as caught:
            read_labelled([str(path)])
        assert "\n" not in str(caught.value)
    when = [{"image": "a.png", "when": datetime(2026, 1, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(when), path)
    with pytest.raises(ConfigError, match=r"labels.parquet:1: 'when' is a datetime"):
        read_labelled([str(path)])
    number = pyarrow.Table.from_pylist([{"image": 7, "brand": "NORVIK"}])
    pyarrow.parquet.write_table(number, path)
    with pytest.raises(ConfigError, match=r"labels.parquet:1: 'image' has no picture"):
        read_labelled([str(path)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="needs the package pyarrow"):
        read_labelled([str(path)])
