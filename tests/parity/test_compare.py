"""Equal deployments are equal; what was asked is kept through a kill; budgets decide with as many cases as it takes."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import pytest

from qvl import ConfigError, Pipeline
from qvl.decisions.questions import read_questions
from qvl.evaluation.agreement import mean_interval
from qvl.parity import Budgets, Case, compare
from qvl.parity.differences import divergence, first_step
from qvl.parity.observation import Observation, TokenStep
from qvl.parity.record_file import RecordFile
from tests.parity.conftest import QUESTION


def test_equal_deployments_part_nowhere(local: Pipeline, cases: list[Case]) -> None:
    asked = read_questions([{"type": "predicate", "instructions": "Is it a mug?"}])
    more = Case("decide", cases[0].pictures, questions=asked)
    with Pipeline(device="cpu", dtype="float32", cache="off", concurrency=3) as other:
        report = compare(local, other, [*cases, more], budgets=Budgets.read(["text=0.5,kl=0.01"]), self_check=True)
    assert report.layer is None
    assert report.causes == []
    assert {"pixels", "picture tokens", "template", "prompt", "log-probabilities", "text", "fields", "decisions"} <= {
        *report.shown
    }
    assert report.agreement["text"].agree == report.agreement["text"].count == len(cases)
    assert report.self_check is not None
    assert report.self_check.same == report.self_check.cases
    # So few cases cannot show how far apart rare ones are.
    assert [verdict.standing for verdict in report.verdicts] == ["within", "undecided"]
    assert json.loads(json.dumps(report.to_json()))["first_layer"] is None


def test_an_unfinished_run_asks_only_what_is_missing(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    asked = []
    few = cases[:4]

    def stop() -> None:
        asked.append(1)
        if len(asked) == 6:
            raise ConfigError("stop")

    with pytest.raises(ConfigError, match="stop"):
        compare(local, local, few, work=tmp_path, advance=stop)
    (first,) = tmp_path.glob("a-*")
    with RecordFile(first) as record:
        kept = {name: record.get(name).seconds for name in record.places}
    assert len(kept) == 4
    # A killed process may leave half a line.
    with first.open("ab") as file:
        file.write(gzip.compress(b'{"observation": {"case": "torn"')[:20])
    report = compare(local, local, few, work=tmp_path)
    assert report.cases == 4
    assert report.layer is None
    assert list(tmp_path.iterdir()) == []


def test_a_record_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl.gz"
    header = {"model": "m", "identity": {}}
    with RecordFile(path, header) as record:
        for number in range(50):
            record.add(Observation(f"case {number}", text="x" * number))
    whole = path.read_bytes()
    for cut in (1, 5, 30):
        path.write_bytes(whole[:-cut])
        with RecordFile(path, header) as record:
            assert len(record.places) == 49
            record.add(Observation("case 49", text="again"))
            assert record.get("case 7").text == "x" * 7
            assert record.get("case 49").text == "again"
    with pytest.raises(ConfigError, match="of another model"):
        RecordFile(path, {"model": "n", "identity": {}})
    path.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="is not a record"):
        RecordFile(path)


def test_a_record_is_written_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl.gz"
    with RecordFile(path, {"model": "m", "identity": {}}), pytest.raises(ConfigError, match="another process writes"):
        RecordFile(path, {"model": "m", "identity": {}})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("text", "cannot be read"),
        ("text=much", "cannot be read"),
        ("text=1.2", "is not a share"),
        ("txt=0.9", "did you mean 'text'"),
        ("kl=0", "out of range"),
        ("text=0.9,text=0.8", "twice"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Budgets.read([text])
    assert wrong in str(caught.value)


def test_cases_that_cannot_be_are_refused(local: Pipeline) -> None:
    with pytest.raises(ConfigError, match="no case"):
        compare(local, local, [])
    with pytest.raises(ConfigError, match="two cases have the id"):
        compare(local, local, [Case("a", question=QUESTION), Case("a", question="What?")])
    with pytest.raises(ConfigError, match="neither a question nor a picture"):
        Case("a")
    with pytest.raises(ConfigError, match="no case measures it"):
        compare(local, local, [Case("a", question="Hello")], budgets=Budgets.read(["field.brand=0.9"]))


def test_a_case_that_one_side_cannot_answer_is_told(local: Pipeline, cases: list[Case], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    report = compare(local, local, [*cases[:2], Case("broken", (broken,), question=QUESTION)])
    assert report.failed == (1, 0)
    assert report.agreement["answered"].agree == 2
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 0.6, "y": 0.4}, {"z": 0.6, "w": 0.4}),
        ({"x": 0.9, "y": 0.1}, {"y": 0.9, "z": 0.1}),
        ({"x": 0.97, "y": 0.02}, {"z": 0.97, "w": 0.02}),
    ],
)
def test_tokens_that_one_side_alone_lists_part_the_distributions(a: dict[str, float], b: dict[str, float]) -> None:
    assert divergence(a, b) > 1.0
    assert divergence(b, a) > 1.0


def test_longer_lists_of_the_same_distribution_are_the_same() -> None:
    whole = {f"{place}": 0.5 ** (place + 1) for place in range(20)}
    few = dict([*whole.items()][:5])
    assert divergence(whole, few) == pytest.approx(0.0, abs=1e-9)
    assert divergence(few, whole) == pytest.approx(0.0, abs=1e-9)
    # Which of two improbable tokens is the last that is listed is chance.
    other = {**dict([*whole.items()][:19]), "another": 0.5**20}
    assert divergence(whole, other) < 1e-5


def test_the_divergence_of_whole_distributions_is_kullbacks_and_leiblers() -> None:
    dice = random.Random(0)
    for _ in range(20):
        lists = [[dice.random() + 0.01 for _ in range(6)] for _ in range(2)]
        a, b = ({f"{place}": value / sum(one) for place, value in enumerate(one)} for one in lists)
        known = sum(a[name] * math.log(a[name] / b[name]) for name in a)
        assert divergence(a, b) == pytest.approx(known, abs=2e-5)


def test_a_sampled_token_far_down_the_list_does_not_shorten_it() -> None:
    """Endpoints list the likeliest tokens, and beside them the chosen one, however improbable."""
    top = {"x": math.log(0.9), "y": math.log(0.06)}
    one, other = TokenStep("x", top["x"], top), TokenStep("rare", math.log(1e-9), top)
    found = first_step([one], [other])
    assert found is not None
    assert found.divergence == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("size", [1.0, 5.0])
def test_a_mean_divergence_is_within_only_where_rare_ones_would_have_been_met(size: float) -> None:
    """Cases of which 1 in 50 is `size` nats apart have a mean far beyond 0.01; few cases often meet none of them."""
    dice, budgets = random.Random(0), Budgets.read(["kl=0.01"])
    standings = []
    for cases in (12, 40, 298):
        for _ in range(8):
            values = [size * (dice.random() < 0.02) for _ in range(cases)]
            kl = sum(values) / cases, mean_interval(values), cases
            (verdict,) = budgets.judge({}, kl)
            standings.append(verdict.standing)
    assert "within" not in standings
    (verdict,) = budgets.judge({}, (0.0, (0.0, 0.0), 298))
    assert (verdict.standing, verdict.why) == ("undecided", "at least 299 cases are needed")
    (verdict,) = budgets.judge({}, (0.0, (0.0, 0.0), 299))
    assert verdict.standing == "within"
