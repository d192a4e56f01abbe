"""What a record is of: the content of pictures, and the noise of the side that was recorded."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl import ConfigError, Pipeline
from qvl.media import gate
from qvl.parity import Case, compare
from qvl.parity.case import digest
from qvl.parity.golden import record_cases, recorded_cases
from qvl.parity.observation import SelfCheck
from qvl.parity.record_file import RecordFile
from tests.parity.test_diagnose import TellingBackend
from tests.server.echo_backend import EchoBackend


def painted(path: Path, colour: str) -> Path:
    Image.new("RGB", (32, 32), colour).save(path)
    return path


def test_cases_are_the_same_if_the_content_of_their_pictures_is(tmp_path: Path) -> None:
    red, blue = painted(tmp_path / "red.png", "red"), painted(tmp_path / "blue.png", "blue")
    copy = painted(tmp_path / "copy.png", "red")

    def of(source: object) -> str:
        return digest([Case("x", (source,), question="?")])

    assert of(red) == of(str(red)) == of(copy) == of(red.read_bytes())
    assert of(red) != of(blue)
    assert of([red, blue]) != of([red, red])
    assert of({"image": str(red)}) == of({"image": str(copy)}) != of({"image": str(blue)})
    assert of(Image.open(red)) == of(Image.open(copy)) != of(Image.open(blue))
    assert of(gate.load(red)) != of(gate.load(blue))
    assert of(np.zeros((8, 8, 3), np.uint8)) != of(np.ones((8, 8, 3), np.uint8))
    assert of("https://a.example/1.png") != of("https://a.example/2.png")
    assert of(tmp_path / "missing.png") != of(tmp_path / "lost.png")
    assert digest([Case("x\udc80", question="\ud83d?")]) != digest([Case("x", question="?")])


def test_a_run_does_not_go_on_with_answers_about_another_picture(tmp_path: Path) -> None:
    shown, backend = painted(tmp_path / "shown.png", "red"), EchoBackend()
    cases = [Case(f"{place}", (shown,), question="What colour?") for place in range(3)]

    def stop() -> None:
        raise ConfigError("stop")

    work = tmp_path / "work"
    with Pipeline(backend=backend, cache="off", concurrency=1) as a, Pipeline(backend=EchoBackend(), cache="off") as b:
        with pytest.raises(ConfigError, match="stop"):
            compare(a, b, cases, work=work, advance=stop)
        before = len(backend.requests)
        compare(a, b, cases, work=work)
        assert len(backend.requests) == before + len(cases) - 1
        with pytest.raises(ConfigError, match="stop"):
            compare(a, b, cases, work=work, advance=stop)
        painted(shown, "blue")
        before = len(backend.requests)
        compare(a, b, cases, work=work)
        assert len(backend.requests) == before + len(cases)


def test_a_record_tells_the_noise_of_its_side(tmp_path: Path) -> None:
    """A's log-probabilities are others each time; B, which is as far off once, is no further from A than A is."""
    cases = [Case(f"{place}", question="What is it?") for place in range(3)]
    quiet, noisy = tmp_path / "quiet.jsonl.gz", tmp_path / "noisy.jsonl.gz"
    for path, self_check in ((quiet, False), (noisy, True)):
        with Pipeline(backend=TellingBackend("sampling"), cache="off", concurrency=1) as a:
            asyncio.run(record_cases(a.pipeline, cases, path, {}, self_check=self_check))
    with Pipeline(backend=TellingBackend("penalty"), cache="off") as b, RecordFile(noisy) as record:
        asked = recorded_cases(record, tmp_path)
        report = compare(record, b, asked, probe=False)
        assert report.self_check is not None
        assert report.self_check == record.self_check
        assert report.self_check.deviation >= 1
        assert report.tolerance == 4 * report.self_check.deviation
        assert report.to_json()["self_check"]["cases"] == 3
    with Pipeline(backend=TellingBackend(), cache="off") as b, RecordFile(quiet) as record:
        assert compare(record, b, asked, probe=False).self_check is None
        with pytest.raises(ConfigError, match="does not tell what A differs by") as caught:
            compare(record, b, asked, self_check=True)
        assert "record A --self-check" in str(caught.value.hint)


def test_noise_is_measured_once(tmp_path: Path) -> None:
    cases, path = [Case(f"{place}", question="What?") for place in range(3)], tmp_path / "golden.jsonl.gz"
    backend = EchoBackend()
    with Pipeline(backend=backend, cache="off") as a:
        for _ in range(2):
            asyncio.run(record_cases(a.pipeline, cases, path, {}, self_check=True))
    assert len(backend.requests) == 3 * len(cases)


def test_a_damaged_self_check_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "golden.jsonl.gz"
    header = {"model": "m", "identity": {}, "language": "en", "cases": "", "request": {}}
    with RecordFile(path, header) as record:
        record.add_self_check(SelfCheck(3, 3, 0, 0.5))
    with RecordFile(path, header) as record:
        assert record.self_check == SelfCheck(3, 3, 0, 0.5)
    with path.open("ab") as file:
        file.write(gzip.compress(json.dumps({"self_check": {"cases": "many"}}).encode() + b"\n", mtime=0))
    with pytest.raises(ConfigError, match="line 3 is broken"):
        RecordFile(path)
