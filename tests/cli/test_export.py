"""`qvl export`: boxes of results in the forms of other tools, read back as those read them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from qvl import Box, Located, Point


def line(picture: str, *items: Located, **more: object) -> str:
    told = {"picture": picture, "ok": True, "located": [item.to_json() for item in items], "width": 200, "height": 100}
    return json.dumps({**told, **more})


CAP = Located("the cap", Box(20, 10, 60, 40, 200, 100), confidence=0.9)
LID = Located('the "lid"', Box(0, 0, 200, 100, 200, 100))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    lines = [
        line("a/one.jpg", LID),
        line("a/one.jpg", CAP, LID),
        line("two.jpg"),
        '{"picture": "lost.jpg", "ok": false, "error": {}}',
        "",
        json.dumps(
            {
                "picture": "three.jpg",
                "analysis": {"parts": [{"name": "x", "where": CAP.shape.to_json()}], "n": 3},
                "field_confidence": {"parts.0.where": 0.5},
                "evidence": {"name": LID.to_json(), "n": None},
            }
        ),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_coco_has_pixels_from_the_corner(qvl, results: Path, tmp_path: Path) -> None:
    ran = qvl("export", str(results), "--format", "coco", "-o", str(tmp_path / "coco.json"))
    assert ran.code == 0
    assert ran.err.startswith("3 pictures, 4 places, 3 labels, 1 left out")
    data = json.loads((tmp_path / "coco.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in data["images"]] == ["a/one.jpg", "two.jpg", "three.jpg"]
    assert {(image["width"], image["height"]) for image in data["images"]} == {(200, 100)}
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = [(item["image_id"], names[item["category_id"]], item["bbox"]) for item in data["annotations"]]
    assert found == [
        (1, "the cap", [20, 10, 40, 30]),
        (1, 'the "lid"', [0, 0, 200, 100]),
        (3, 'the "lid"', [0, 0, 200, 100]),
        (3, "parts.where", [20, 10, 40, 30]),
    ]
    assert [item.get("score") for item in data["annotations"]] == [0.9, None, None, 0.5]
    assert [item["id"] for item in data["annotations"]] == [1, 2, 3, 4]


def test_yolo_has_middles_and_sizes_as_shares(qvl, results: Path, tmp_path: Path) -> None:
    assert qvl("export", str(results), "-f", "yolo", "-o", str(tmp_path / "set")).code == 0
    names = yaml.safe_load((tmp_path / "set" / "data.yaml").read_text(encoding="utf-8"))["names"]
    assert names == {0: "the cap", 1: 'the "lid"', 2: "parts.where"}
    rows = (tmp_path / "set" / "labels" / "one.txt").read_text().splitlines()
    assert rows[0] == "0 0.200000 0.250000 0.200000 0.300000"
    assert rows[1] == "1 0.500000 0.500000 1.000000 1.000000"
    assert (tmp_path / "set" / "labels" / "two.txt").read_text() == ""


def test_one_is_one(qvl, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("a.jpg", CAP), encoding="utf-8")
    ran = qvl("export", str(path), "--format", "coco", "-o", str(tmp_path / "coco.json"))
    assert ran.err.startswith("1 picture, 1 place, 1 label: ")


def test_yolo_has_a_file_for_each_page(qvl, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(f"{line('a/bill.pdf#page=1', CAP)}\n{line('a/bill.pdf#page=12', LID)}\n")
    assert qvl("export", str(tmp_path / "r.jsonl"), "-f", "yolo", "-o", str(tmp_path / "set")).code == 0
    assert {path.name for path in (tmp_path / "set" / "labels").iterdir()} == {"bill-page-1.txt", "bill-page-12.txt"}


def test_label_studio_has_per_cent_and_its_interface(qvl, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    results.write_text(line("one.jpg", CAP, Located("tip", point=Point(50, 50, 200, 100))), encoding="utf-8")
    assert qvl("export", str(results), "-f", "label-studio", "-o", str(tmp_path / "tasks.json")).code == 0
    (task,) = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert task["data"] == {"image": "one.jpg"}
    box, point = task["predictions"][0]["result"]
    assert box["value"] == {
        "x": 10.0,
        "y": 10.0,
        "width": 20.0,
        "height": 30.0,
        "rotation": 0,
        "rectanglelabels": ["the cap"],
    }
    assert (point["type"], point["value"]["x"], point["value"]["y"]) == ("keypointlabels", 25.0, 50.0)
    config = ElementTree.parse(tmp_path / "tasks.xml").getroot()
    controls = {control.get("name"): control for control in config if control.get("toName")}
    assert {box["from_name"], point["from_name"]} == set(controls)
    assert [label.get("value") for label in controls["label"]] == ["the cap", "tip"]


@pytest.mark.parametrize(
    ("lines", "form", "message"),
    [
        (["{"], "coco", ":1 is not JSON"),
        (["[]"], "coco", ":1 is not a result of qvl locate"),
        ([line("a.jpg", CAP), '{"text": "x"}'], "coco", ":2 is not a result"),
        ([line("a.jpg", located=[{"label": "x", "box": {"x1": 1}}])], "coco", ":1 has a wrong place"),
        (
            [line("a.jpg", located=[{"label": "x", "box": {**CAP.shape.to_json(), "x2": 900}}])],
            "coco",
            "outside of the",
        ),
        (['{"picture": "a.jpg", "ok": false}'], "coco", "no picture to export: 1 failed"),
        (['{"picture": "a.jpg", "text": "x"}'], "coco", "1 have neither a place nor the picture's size"),
        ([line("a.jpg", Located("tip", point=Point(5, 5, 200, 100)))], "yolo", "the results have 1 point ("),
        ([line("a/x.jpg", CAP), line("b/x.png", CAP)], "yolo", "would both be labels/x.txt"),
        ([line("a.jpg", CAP)], "voc", "unknown format 'voc' (one of coco, yolo, label-studio)"),
    ],
)
def test_wrong_use_is_one_line(qvl, tmp_path: Path, lines: list[str], form: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    ran = qvl("export", str(path), "-f", form, "-o", str(tmp_path / "out"))
    assert ran.code == 2
    assert message in ran.error


def test_a_file_that_is_not_there_is_named(qvl, tmp_path: Path) -> None:
    assert "nowhere.jsonl cannot be read" in qvl("export", "nowhere.jsonl", "-f", "coco", "-o", "x.json").error
