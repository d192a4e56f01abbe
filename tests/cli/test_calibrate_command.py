"""`qvl calibrate`, and the options that use what it writes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.shelf import write_shelf
from tests.evaluation.test_calibrate_boxes import write_boxes

from .conftest import Ran, install

MODEL = ("-m", "reader:reader-1")
PLUGIN = """
import qvl
from tests.evaluation.shelf import Reader
from tests.evaluation.test_calibrate_boxes import FOUND, SEEN

@qvl.hookimpl
def register_backends(register):
    register("reader", lambda model, **options: Reader(model=model, **options))
    register("boxes", lambda model, **options: Boxes(model=model, **options))

class Boxes(Reader):
    async def stream(self, request):
        told = FOUND if request.response_format.name == "located" else SEEN
        async for chunk in Reader(answer=lambda _: told).stream(request):
            yield chunk
"""


@pytest.fixture(autouse=True)
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "qvl_reader.py").write_text(PLUGIN)
    install(site, "reader", "qvl_reader")
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def shelf(folder: Path) -> Path:
    return write_shelf(folder / "shelf", 60)


def test_labels_make_a_calibration_a_report_and_thresholds_that_are_used(qvl: Callable[..., Ran], shelf: Path) -> None:
    made = qvl("calibrate", str(shelf), *MODEL, "--at-precision", "0.4", "-o", "cal.json", "--report", "page.html")
    assert made.code == 0, made.err
    assert "wrote cal.json" in made.out
    [use] = [line for line in made.out.splitlines() if line.startswith("use it: ")]
    assert "--calibration cal.json" in use
    assert "--abstain brand=" in use
    assert "--abstain category=" in use, "all of it in one line, however narrow the terminal"
    assert "brand, for 40%: confidence from" in made.out
    page = Path("page.html").read_text()
    assert page.count("<svg") == 3
    assert "brand: reliability" in page
    assert "category: risk against coverage" in page
    picture = str(shelf.parent / "0.png")
    sure = qvl("analyze", picture, *MODEL, "--calibration", "cal.json", "--json").lines[0]
    assert sure["confidence_method"] == "calibrated"
    # The answers of the calibration are in the cache, whose key does not know of it.
    assert sure["cache"] == "hit"
    least = f"brand={sure['field_confidence']['brand'] + 0.001:.4f}"
    silent = qvl("analyze", picture, *MODEL, "--calibration", "cal.json", "--abstain", least, "--json").lines[0]
    assert silent["analysis"]["brand"] is None
    assert silent["abstained"] == {"brand": "below_threshold"}
    shown = qvl("analyze", picture, *MODEL, "--calibration", "cal.json", "--abstain", least)
    assert "cannot tell" in shown.out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_the_cache_and_json_has_all_measures(
    qvl: Callable[..., Ran], shelf: Path
) -> None:
    lines = shelf.read_text().splitlines()
    half = shelf.parent / "half.jsonl"
    half.write_text("\n".join(lines[:55]))
    first = qvl("calibrate", str(half), *MODEL, "--json", "-o", "cal.json", "--report", "page.json")
    assert first.code == 0, first.err
    told = first.lines[0]
    assert told["calibration"] == "cal.json"
    assert {one["name"] for one in told["fields"]} == {"(whole answer)", "brand", "category"}
    assert json.loads(Path("page.json").read_text())["fields"] == told["fields"]
    again = qvl("calibrate", str(half), *MODEL, "--json", "-o", "cal.json").lines[0]
    assert again["fields"] == told["fields"]


@pytest.mark.slow
def test_a_calibration_is_measured_on_other_labels(qvl: Callable[..., Ran], shelf: Path, folder: Path) -> None:
    assert qvl("calibrate", str(shelf), *MODEL, "-o", "cal.json").code == 0
    before = Path("cal.json").read_text()
    fresh = write_shelf(folder / "fresh", 50, seed=5)
    ran = qvl("calibrate", str(fresh), *MODEL, "--calibration", "cal.json", "--abstain", "brand=0.5", "--json")
    assert ran.code == 0, ran.err
    brand = next(one for one in ran.lines[0]["fields"] if one["name"] == "brand")
    assert brand["at_threshold"]["threshold"] == 0.5
    assert brand["calibrated"]["brier"] < brand["raw"]["brier"]
    assert ran.lines[0]["calibration"] is None
    assert Path("cal.json").read_text() == before
    assert not Path("calibration.json").exists()


def test_decisions_are_calibrated_with_labels_of_their_names(qvl: Callable[..., Ran], shelf: Path) -> None:
    lines = [json.loads(line) for line in shelf.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["expected"] = {"Is it new?": number % 4 != 0}
    shelf.write_text("\n".join(map(json.dumps, lines)))
    made = qvl("calibrate", str(shelf), *MODEL, "-q", "Is it new?", "-o", "cal.json", "--json")
    assert made.code == 0, made.err
    # It says yes from half a confidence on.
    widths = []
    for number in range(60):
        with Image.open(shelf.parent / f"{number}.png") as image:
            widths.append(image.width)
    right = sum((width > 500) == (number % 4 != 0) for number, width in enumerate(widths))
    assert [(one["name"], one["kind"], one["right"]) for one in made.lines[0]["fields"]] == [
        ("Is it new?", "question", right)
    ]
    picture = str(shelf.parent / "0.png")
    told = qvl("decide", picture, *MODEL, "-q", "Is it new?", "--calibration", "cal.json", "--json").lines[0][
        "answers"
    ][0]
    assert told["confidence_method"] == "calibrated"
    silent = qvl("decide", picture, *MODEL, "-q", "Is it new?", "--calibration", "cal.json", "--abstain", "1")
    assert "cannot tell" in silent.out


@pytest.mark.slow
def test_the_commands_that_are_printed_use_the_calibration(qvl: Callable[..., Ran], folder: Path) -> None:
    labels = write_boxes(folder, 60)
    lines = [json.loads(line) for line in labels.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["expected"] |= {"brand": "NORVIK", "Is it Tim's?": number % 4 != 0}
    labels.write_text("\n".join(map(json.dumps, lines)))
    asked = ("--field", "brand", "--evidence", "-q", "Is it Tim's?", "--locate", "the brand")
    made = qvl("calibrate", str(labels), "-m", "boxes:qwen3-vl", *asked, "--at-precision", "0.2", "-o", "cal.json")
    assert made.code == 0, made.err
    printed = [shlex.split(line)[3:] for line in made.out.splitlines() if line.startswith("use it: qvl ")]
    assert [words[0] for words in printed] == ["analyze", "decide", "locate"]
    assert "--evidence" in printed[0]
    for words in printed:
        ran = qvl(*[str(folder / "0.png") if word == "PICTURE" else word for word in words], "--json")
        assert ran.code == 0, ran.err
        assert "calibrated" in ran.out
    ran = qvl("analyze", str(folder / "0.png"), "-m", "boxes:qwen3-vl", "--calibration", "cal.json")
    assert ran.code == 2
    assert "the calibration is of analyses with evidence, and this one is without (evidence=True, --evid" in ran.error


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, ("--at-precision", "95"), "--at-precision 95.0 is not a share"),
        ({}, ("--abstain", "0.9"), "--abstain needs --calibration here"),
        ({}, ("--abstain", "much", "--calibration", "x.json"), "x.json cannot be read"),
        ({}, ("--compare", "brand=fuzzy"), "--compare 'brand=fuzzy' cannot be read"),
        ({}, ("--compare", "price=text"), "--compare: the schema has no field 'price'"),
        ({}, ("--field", "price"), "no line labels the field 'price'"),
        ({}, ("-o", "none/cal.json"), "--output none/cal.json cannot be written"),
        ({}, ("-q", "Is it new?"), "no line labels the question 'Is it new?'"),
        ({"price": 3}, (), "'price' is not a field of ProductFields"),
        ({"category": None, "Is it new?": "maybe"}, ("-q", "Is it new?"), "'maybe' is not an answer to 'Is it new?'"),
        ("category", (), "no line labels the field 'category'"),
        ("20", (), "too few labels: brand has 20, 30 more are needed; category has 20, 30 more are needed"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_nothing_is_written(
    qvl: Callable[..., Ran], shelf: Path, change: object, options: tuple[str, ...], said: str
) -> None:
    lines = [json.loads(line) for line in shelf.read_text().splitlines()]
    for line in lines:
        if isinstance(change, dict):
            line["expected"] |= change
        elif change == "category":
            del line["expected"]["category"]
    shelf.write_text("\n".join(map(json.dumps, lines[:20] if change == "20" else lines)))
    ran = qvl("calibrate", str(shelf), *MODEL, *options)
    assert ran.code == 2
    assert said in ran.error
    assert not Path("calibration.json").exists()


def test_a_picture_that_fails_is_told_and_the_others_are_calibrated(qvl: Callable[..., Ran], shelf: Path) -> None:
    (shelf.parent / "7.png").write_bytes(b"no picture")
    ran = qvl("calibrate", str(shelf), *MODEL, "-o", "cal.json")
    assert ran.code == 1
    assert f"{shelf}:8: " in ran.err
    assert "59 of 60 lines" in ran.out
    assert Path("cal.json").exists()


def test_a_calibration_of_another_model_is_one_line(qvl: Callable[..., Ran], shelf: Path) -> None:
    assert qvl("calibrate", str(shelf), *MODEL, "-o", "cal.json").code == 0
    picture = str(shelf.parent / "0.png")
    for command in ("analyze", "decide"):
        asked = ("-q", "Is it new?") if command == "decide" else ()
        ran = qvl(command, picture, *asked, "-m", "reader:reader-2", "--calibration", "cal.json")
        assert ran.code == 2
        assert "another model: made with reader-1, used with reader-2" in ran.error
    ran = qvl("analyze", picture, *MODEL, "--abstain", "0.9")
    assert ran.code == 2
    assert "abstain needs a calibration" in ran.error


def test_locate_refuses_a_calibration_that_is_not_of_boxes(qvl: Callable[..., Ran], shelf: Path) -> None:
    assert qvl("calibrate", str(shelf), *MODEL, "-o", "cal.json").code == 0
    picture = str(shelf.parent / "0.png")
    refused = qvl("locate", picture, "the brand", *MODEL, "--calibration", "cal.json", "--abstain", "0.9")
    assert refused.code == 2
    assert "the calibration cal.json is not of boxes" in refused.error
    refused = qvl("locate", picture, "the brand", "--points", *MODEL, "--calibration", "cal.json")
    assert refused.code == 2
    assert "points have no calibration" in refused.error
