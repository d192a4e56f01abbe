"""`qvl eval`: how often answers are right, what kinds of values are measured by, and the gate against another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from qvl import AsyncPipeline
from qvl.cli import app
from qvl.cli.eval import _show
from qvl.evaluation.against import against
from qvl.evaluation.evaluate import EvalReport, Evaluator, similarity
from qvl.evaluation.labelled import read_labelled
from qvl.evaluation.measures import wilson
from qvl.html.evaluate import eval_html
from qvl.types import JsonObject
from tests.evaluation.shelf import Reader
from tests.media.films import film

stats = pytest.importorskip("scipy.stats")
BOX = {"x1": 0, "y1": 0, "x2": 10, "y2": 10}
SCHEMA: JsonObject = {
    "type": "object",
    "properties": {
        "brand": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {name: {"type": "number"} for name in BOX}},
    },
}


def shelf(folder: Path, labels: list[JsonObject]) -> Path:
    lines = []
    for number, label in enumerate(labels):
        Image.new("RGB", (600 + number, 40), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "id": f"l{number}", "expected": label}))
    path = folder / "labels.jsonl"
    path.write_text("\n".join(lines))
    return path


async def evaluated(path: Path, reader: Reader, schema: JsonObject = SCHEMA) -> EvalReport:
    lines = read_labelled([str(path)])
    only = sorted({name for line in lines for name in line.expected})
    async with AsyncPipeline(backend=reader, cache="off") as pipe:
        return await Evaluator(pipe, lines, schema=schema, only=only).evaluate("reader")


@pytest.mark.anyio
async def test_each_kind_of_value_has_its_measure(tmp_path: Path) -> None:
    labels: list[JsonObject] = [
        {"brand": "norvik", "tags": ["red", "blue"], "where": BOX},
        {"brand": "NORVIX", "tags": ["red"], "where": {**BOX, "x2": 20}},
    ]
    path = shelf(tmp_path, labels)
    reader = Reader(answer=lambda sure: {"brand": "NORVIK", "tags": ["blue", "green"], "where": BOX}, logprobs=False)
    report = await evaluated(path, reader)
    scores = {score.name: score for score in report.fields}
    assert report.fields[0].name == "(whole answer)"
    assert (scores["brand"].right, scores["brand"].labels) == (1, 2)
    assert scores["brand"].similarity == pytest.approx((1 + 5 / 6) / 2)
    items = scores["tags"].items
    assert items is not None
    # Of four told one is right, of three labelled.
    assert (items.precision, items.recall) == (pytest.approx(1 / 4), pytest.approx(1 / 3))
    assert items.f1 == pytest.approx(2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3))
    assert scores["where"].iou == pytest.approx(0.75)
    assert [(one.line, one.path, one.value) for one in report.wrong if one.path == "brand"] == [
        ("l1", "brand", "NORVIK")
    ]
    assert report.usage.prompt_tokens == 20
    assert json.loads(json.dumps(report.to_json()))["lines"] == 2


@pytest.mark.anyio
async def test_items_of_one_list_are_no_lines_of_their_own(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"tags": ["red"] * 10 if number % 2 else ["blue"] * 10} for number in range(8)])
    report = await evaluated(path, Reader(answer=lambda sure: {"tags": ["red"] * 10}))
    (items,) = [score for score in report.fields if score.name == "tags.*"]
    assert (items.right, items.labels, items.lines) == (40, 80, 8)
    assert items.interval == pytest.approx(wilson(4, 8))


@pytest.mark.anyio
async def test_an_answer_that_does_not_come_is_wrong(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"brand": "NORVIK"}, {"brand": "NORVIK"}])
    (tmp_path / "1.png").write_bytes(b"no picture")
    report = await evaluated(path, Reader(answer=lambda sure: {"brand": "NORVIK"}))
    (brand,) = [score for score in report.fields if score.name == "brand"]
    assert (brand.right, brand.labels, brand.unanswered) == (1, 2, 1)
    assert len(report.failed) == 1


@pytest.mark.anyio
async def test_a_worse_model_is_beyond_what_is_allowed(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"brand": "NORVIK"} for _ in range(60)])
    good = await evaluated(path, Reader(answer=lambda sure: {"brand": "NORVIK"}))
    bad = await evaluated(path, Reader(answer=lambda sure: {"brand": "NORVIK" if sure < 0.63 else "TIMORA"}))
    worse = against(bad, good, 0.05)
    assert worse.standing == "beyond"
    assert worse.fields["brand"].only_a == 30
    assert worse.fields["brand"].p_value < 1e-6
    assert against(good, bad, 0.05).standing == "within"
    assert against(good, good, 0.001).standing == "undecided"
    assert against(good, good, None).standing == "told"


@pytest.mark.anyio
async def test_what_is_no_mere_right_or_wrong_is_compared_line_by_line(tmp_path: Path) -> None:
    """Both are wrong in each line, so that right and wrong tell nothing: one is nearer in every measure."""
    label: JsonObject = {"brand": "NORVIK", "tags": ["red", "blue"], "where": BOX}
    path = shelf(tmp_path, [label for _ in range(12)])
    near = {"brand": "NORVIX", "tags": ["red", "green"], "where": {**BOX, "x2": 25}}
    far = {"brand": "OTHER", "tags": ["green"], "where": {**BOX, "x2": 90}}
    one = await evaluated(path, Reader(answer=lambda sure: near if sure < 0.608 else far))
    other = await evaluated(path, Reader(answer=lambda sure: far))
    found = against(one, other, 0.05)
    assert {name: paired.difference for name, paired in found.fields.items() if paired.difference} == {}
    scores = {(score.field, score.measure): score for score in found.scores}
    assert {*scores} == {("brand", "similarity"), ("tags", "F1"), ("tags.*", "similarity"), ("where", "IoU")}
    for (name, measure), score in scores.items():
        lines = sorted({line for line, field, kind in one.scores if (field, kind) == (name, measure)})
        pairs = [(other.scores[line, name, measure], one.scores[line, name, measure]) for line in lines]
        assert score.count == len(pairs) == 12
        assert score.b - score.a == pytest.approx(score.difference)
        known = stats.bootstrap(
            ([b - a for a, b in pairs],), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert score.interval == pytest.approx((known.low, known.high), abs=0.02)
        assert 0 < score.interval[0] <= score.difference <= score.interval[1]
    few = against(one, one, None)
    assert [score.difference for score in few.scores] == [0.0] * 4
    page = eval_html(one.to_json(), found.to_json(), {})
    assert "bootstrap over lines" in page


@pytest.mark.anyio
async def test_few_lines_tell_no_interval_of_a_measure(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"brand": "NORVIK"} for _ in range(9)])
    one = await evaluated(path, Reader(answer=lambda sure: {"brand": "NORVIX"}))
    (score,) = against(one, one, None).scores
    assert (score.count, score.interval) == (9, None)
    json.dumps(against(one, one, None).to_json(), allow_nan=False)


@pytest.mark.anyio
async def test_an_answer_that_does_not_come_is_near_to_nothing(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"brand": "NORVIK", "tags": ["a"]}, {"brand": "NORVIK", "tags": ["a"]}])
    (tmp_path / "1.png").write_bytes(b"no picture")
    report = await evaluated(path, Reader(answer=lambda sure: {"brand": "NORVIK", "tags": ["a"]}))
    scores = {score.name: score for score in report.fields}
    assert scores["brand"].similarity == 0.5
    assert scores["tags"].items is not None
    assert scores["tags"].items.recall == 0.5


@pytest.mark.anyio
@pytest.mark.parametrize("told", [[], ["red"], ["red", "blue"], ["blue", "red"], None])
@pytest.mark.parametrize("label", [[], ["red"], ["red", "blue"]])
async def test_every_field_has_labels(tmp_path: Path, label: list[str], told: list[str] | None) -> None:
    """A list counts as a whole, and by its items; numbers that JSON does not have come nowhere."""
    path = shelf(tmp_path, [{"tags": label}])
    report = await evaluated(path, Reader(answer=lambda sure: {} if told is None else {"tags": told}))
    assert all(score.labels for score in report.fields)
    (tags,) = (score for score in report.fields if score.name == "tags")
    assert (tags.labels, bool(tags.right)) == (1, told == label)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("one", "other", "alike"), [("kitten", "sitting", 1 - 3 / 7), ("", "a", 0.0), ("", "", 1.0), ("Ａ b", "a  B", 1.0)]
)
def test_similarity_is_by_edits(one: str, other: str, alike: float) -> None:
    assert similarity(one, other) == pytest.approx(alike)


def test_the_command(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "examples" / "pictures"
    page, data = tmp_path / "eval.html", tmp_path / "eval.json"
    lines = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()[:4]]
    lines[0]["expected"]["brand"] = "WRONG"
    for line in lines:
        line["image"] = str(folder / line["image"])
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, lines)))
    command = ["eval", str(labels), "--device", "cpu", "--cache", "memory:"]
    done = CliRunner().invoke(app, [*command, "--html", str(page), "-o", str(data)])
    assert done.exit_code == 0, done.output
    assert "3 of 4" in done.output
    assert "WRONG" in page.read_text()
    assert json.loads(data.read_text())["fields"][0]["right"] == 3
    done = CliRunner().invoke(app, [*command, "--allow", "0.01"])
    assert done.exit_code == 2
    assert "--against" in done.output


@pytest.mark.anyio
async def test_long_names_of_fields_are_whole_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "registered_trademark_as_printed_on_the_packaging"
    path = shelf(tmp_path, [{name: "NORVIK"} for _ in range(12)])
    schema: JsonObject = {"type": "object", "properties": {name: {"type": "string"}}}
    report = await evaluated(path, Reader(answer=lambda sure: {name: "NORVIK"}), schema)
    _show(report, against(report, report, 0.5))
    cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(cells).count(name) == 2


@pytest.mark.slow
def test_a_film_is_measured_as_a_picture_is(tmp_path: Path) -> None:
    film(tmp_path / "mug.mp4", size=(320, 240))
    labels, data = tmp_path / "labels.jsonl", tmp_path / "eval.json"
    labels.write_text(json.dumps({"video": "mug.mp4", "expected": {"attributes": {"color": "blue"}}}))
    command = ["eval", str(labels), "--device", "cpu", "--cache", "memory:", "--video", "nframes=4"]
    done = CliRunner().invoke(app, [*command, "-o", str(data)])
    assert done.exit_code == 0, done.output
    report = json.loads(data.read_text())
    assert (report["lines"], report["failed"], report["usage"]["video_frames"]) == (1, {}, 4)
    color = next(one for one in report["fields"] if one["name"] == "attributes.color")
    assert color["labels"] == 1
