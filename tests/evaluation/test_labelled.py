"""Labelled pictures: the forms of bench's lines, and one clear line for each that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qvl.errors import ConfigError
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


def test_a_folder_without_labels_and_parquet_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no labels"):
        read_labelled([str(folder)])
    with pytest.raises(ConfigError, match="parquet is not read"):
        read_labelled([str(folder / "labels.parquet")])
