"""Golden files: unpacked within bounds, damage named by line, what failed asked again, what was answered kept."""

from __future__ import annotations

import base64
import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest

from qvl import AsyncPipeline, ConfigError, Pipeline
from qvl.parity import Case, compare, record_file
from qvl.parity.golden import record_cases, recorded_cases, recorded_request
from qvl.parity.observation import Observation
from qvl.parity.record_file import RecordFile
from qvl.types import JsonObject
from tests.parity.away import AwayBackend
from tests.server.echo_backend import EchoBackend

HEADER: JsonObject = {
    "format": "qvl-parity",
    "version": 1,
    "model": "m",
    "identity": {},
    "language": "en",
    "cases": "0",
    "request": {},
}
PIXEL = base64.b64encode(b"some bytes").decode()


def line(value: object) -> bytes:
    return gzip.compress(json.dumps(value).encode() + b"\n", mtime=0)


def golden(path: Path, *, header: JsonObject = HEADER, **case: object) -> Path:
    asked = {"id": "one", "question": "What?", "pictures": [PIXEL], **case}
    seen = Observation("one", text="red").to_json()
    path.write_bytes(line(header) + line({"case": asked}) + line({"observation": seen}))
    return path


def read(path: Path) -> list[Case]:
    with RecordFile(path) as record:
        recorded_request(record)
        return recorded_cases(record, path.parent)


def test_a_whole_one_is_read(tmp_path: Path) -> None:
    (case,) = read(golden(tmp_path / "golden.jsonl.gz"))
    (picture,) = case.pictures
    assert isinstance(picture, Path)
    assert (case.question, picture.read_bytes()) == ("What?", b"some bytes")


@pytest.mark.parametrize("name", ["model", "identity", "language", "cases", "request"])
def test_a_header_says_all_that_it_must(tmp_path: Path, name: str) -> None:
    path = tmp_path / "golden.jsonl.gz"
    for header, wrong in (
        ({key: value for key, value in HEADER.items() if key != name}, "is missing"),
        ({**HEADER, name: 7}, "is not what it must be"),
    ):
        with pytest.raises(ConfigError, match=f"line 1: '{name}' {wrong}"):
            read(golden(path, header=header))


def test_a_request_that_would_have_the_other_side_answer_from_its_cache_is_refused(tmp_path: Path) -> None:
    path = golden(tmp_path / "golden.jsonl.gz", header={**HEADER, "request": {"cache": "always"}})
    with pytest.raises(ConfigError, match="line 1: its request has 'cache'"):
        read(path)
    with pytest.raises(ConfigError, match="cannot have 'cache'"):
        compare("echo", "echo", [Case("one", question="What?")], request={"cache": "auto"})


@pytest.mark.parametrize(
    "case",
    [
        {"pictures": [PIXEL[:4] + "~" + PIXEL[4:]]},
        {"pictures": PIXEL},
        {"question": 5},
        {"question": None, "questions": [{"type": "nothing"}]},
        {"question": None, "analysis": {"type": "nothing"}},
    ],
)
def test_a_case_that_cannot_be_asked_is_named(tmp_path: Path, case: JsonObject) -> None:
    with pytest.raises(ConfigError, match="the case one cannot be asked"):
        read(golden(tmp_path / "golden.jsonl.gz", **case))


def test_each_place_at_which_one_may_be_cut_or_flipped_is_told(tmp_path: Path) -> None:
    path = golden(tmp_path / "golden.jsonl.gz")
    whole = path.read_bytes()
    ends = [len(line(HEADER))]
    ends.append(whole.index(whole[:10], ends[0] + 1))
    for cut in range(1, len(whole), 3):
        path.write_bytes(whole[:cut])
        if cut not in ends:
            number = 1 + sum(cut > end for end in ends)
            with pytest.raises(ConfigError, match=f"is cut off in line {number}, at byte"):
                read(path)
    path.write_bytes(whole)
    refused: list[str] = []
    with RecordFile(path) as record:
        told = record.header, record.case("one"), record.get("one")
    for place in range(0, len(whole), 3):
        flipped = bytes([whole[place] ^ 0x10])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        try:
            read(path)
        except ConfigError as exc:
            refused.append(str(exc))
        else:
            # Some bits say nothing: the time of a line, and those behind the last of its code.
            with RecordFile(path) as record:
                assert (record.header, record.case("one"), record.get("one")) == told
    assert len(refused) > len(whole) // 4
    assert all(re.search("is broken|is cut off|not a record", why) for why in refused)
    path.write_bytes(whole + b"\0" * 9)
    with pytest.raises(ConfigError, match="is broken in line 4"):
        read(path)


def test_what_goes_on_keeps_all_behind_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl.gz"
    with RecordFile(path, HEADER) as record:
        for number in range(9):
            record.add(Observation(f"case {number}", text="x" * 500))
        place = record.places["case 4"]
    whole = path.read_bytes()
    # The second makes the rest of the file look like one line that goes on.
    for offset, byte in ((14, 0xFF), (3, 0x1F)):
        path.write_bytes(whole[: place + offset] + bytes([byte]) + whole[place + offset + 1 :])
        damaged = path.read_bytes()
        with pytest.raises(ConfigError, match="in line 6"):
            RecordFile(path, HEADER)
        assert path.read_bytes() == damaged


def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "MOST_BYTES", 1 << 20)
    path = golden(tmp_path / "golden.jsonl.gz")
    with path.open("ab") as file:
        file.write(gzip.compress(b" " * (64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="unpacks to more than 1 MiB in line 4"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with RecordFile(tmp_path / "other.jsonl.gz", HEADER) as record:
        with pytest.raises(ConfigError, match="does not fit"):
            record.add_case({"id": "one", "pictures": ["x" * (2 << 20)]})
        assert record.cases == {}


def test_a_case_may_be_called_as_another_with_case_before_it(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "record.jsonl.gz", HEADER) as record:
        record.add(Observation("case one", text="of case one"))
        record.add_case({"id": "one", "question": "What?"})
        record.add(Observation("one", text="of one"))
        assert record.get("case one").text == "of case one"
        assert record.case("one")["question"] == "What?"
    with RecordFile(tmp_path / "record.jsonl.gz") as again:
        assert [again.get(name).text for name in ("case one", "one")] == ["of case one", "of one"]
        assert list(again.cases) == ["one"]


CASES = [Case(f"{number}", question=f"Question {number}?") for number in range(6)]


def asked(backend: EchoBackend) -> list[str]:
    return sorted(request.messages[-1].text for request in backend.requests)


@pytest.mark.anyio
async def test_recording_again_asks_what_failed_and_nothing_else(tmp_path: Path) -> None:
    path, backend = tmp_path / "golden.jsonl.gz", AwayBackend()
    backend.away = ("2", "4")
    async with AsyncPipeline(backend=backend, cache="off") as pipe:
        assert await record_cases(pipe, CASES, path, {}) == 2
        backend.away, backend.requests = (), []
        assert await record_cases(pipe, CASES, path, {}) == 0
        assert asked(backend) == ["Question 2?", "Question 4?"]
        backend.requests = []
        assert await record_cases(pipe, CASES, path, {}) == 0
        assert asked(backend) == []
    with RecordFile(path) as record:
        assert [record.get(case.id).error for case in CASES] == [None] * len(CASES)


def test_comparing_again_asks_what_an_outage_left_and_nothing_else(tmp_path: Path) -> None:
    a, b = EchoBackend(), AwayBackend()
    b.away = ("1", "5")
    with Pipeline(backend=a, cache="off") as one, Pipeline(backend=b, cache="off") as other:
        report = compare(one, other, CASES, work=tmp_path, probe=False)
        assert (report.failed, report.retryable) == ((0, 2), 2)
        b.away, a.requests, b.requests = (), [], []
        report = compare(one, other, CASES, work=tmp_path, probe=False)
        assert (report.failed, report.retryable, report.layer) == ((0, 0), 0, None)
        assert (asked(a), asked(b)) == ([], ["Question 1?", "Question 5?"])
        # What ended begins anew.
        assert list(tmp_path.iterdir()) == []
        compare(one, other, CASES, work=tmp_path, probe=False)
        assert len(asked(a)) == len(CASES)


def test_what_never_can_be_answered_does_not_keep_a_run_open(tmp_path: Path) -> None:
    """Else the answers of an endpoint that was mended in the meantime would be those of before."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with Pipeline(backend=EchoBackend(), cache="off") as pipe:
        report = compare(pipe, pipe, [*CASES, Case("b", (broken,), question="What?")], work=tmp_path / "work")
    assert (report.failed, report.retryable) == ((1, 0), 0)
    assert list((tmp_path / "work").iterdir()) == []


def test_the_other_side_is_looked_at_before_the_first_is_asked() -> None:
    backend = EchoBackend()
    with Pipeline(backend=backend, cache="off") as pipe:
        for other in ("local:/no/such/folder", Pipeline(device="cpu", dtype="int3", cache="off")):
            with pytest.raises(ConfigError, match=r"not found|int3"):
                compare(pipe, other, CASES)
        assert backend.requests == []
