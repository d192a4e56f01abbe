"""Equal deployments are equal; what was asked is kept through a kill; budgets decide with as many cases as it takes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qvl import ConfigError, Pipeline
from qvl.decisions.questions import read_questions
from qvl.parity import Budgets, Case, compare
from qvl.parity.observation import Observation
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
    assert report.verdicts[0].standing == "within"
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
