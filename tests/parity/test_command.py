"""`qvl parity`, `record` and `check`, and `eval --against`, as commands: exit codes, and one line for what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from qvl.cli import app
from qvl.types import ChatRequest, Chunk
from tests.parity.away import AwayBackend
from tests.server.conftest import Running, serve
from tests.server.echo_backend import EchoBackend

__all__ = ["serve"]

QUESTIONS = 20
DOWN = "openai:echo-vl,base_url=http://127.0.0.1:1/v1,api_key=x,max_retries=0"


class ShortBackend(EchoBackend):
    """Says one word of what it would say."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        short = request.replace(sampling=dataclasses.replace(request.sampling, max_tokens=1))
        async with aclosing(super().stream(short)) as chunks:
            async for chunk in chunks:
                yield chunk


def qvl(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    questions = [json.dumps(f"Question {number}.") for number in range(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    return ["--pictures", str(tmp_path / "red.png"), "--questions", str(tmp_path / "questions.jsonl")]


@pytest.fixture
def named(serve: Callable[..., Running]) -> Callable[[EchoBackend], str]:
    def name(backend: EchoBackend) -> str:
        return f"openai:echo-vl,base_url={serve(backend, cache='off').url}/v1,api_key=x,max_retries=0"

    return name


def said(backend: EchoBackend) -> list[str]:
    return sorted(one.messages[-1].text for one in backend.requests if "Question" in one.messages[-1].text)


def test_within_beyond_and_undecided(tmp_path: Path, asked: list[str], named: Callable[[EchoBackend], str]) -> None:
    a, same, short = named(EchoBackend()), named(EchoBackend()), named(ShortBackend())
    golden = str(tmp_path / "golden.jsonl.gz")
    assert qvl("parity", "record", a, *asked, "-o", golden)[0] == 0
    for b, budget, code, told in (
        (same, "text=0.8", 0, "text=0.8: within"),
        (same, "text=0.99", 2, "text=0.99: undecided"),
        (short, "text=0.8", 1, "text=0.8: beyond"),
    ):
        for words in (["parity", a, b, *asked], ["parity", "check", b, golden]):
            found, output = qvl(*words, "--budget", budget)
            assert found == code, output
            assert told in output


@pytest.mark.parametrize("down", [DOWN, "local:/no/such/folder", "bundled,dtype=int3", "bundled,device=tpu"])
def test_a_side_that_cannot_be_opened_is_no_verdict(
    tmp_path: Path, asked: list[str], named: Callable[[EchoBackend], str], down: str
) -> None:
    """And it is told before the other side is asked."""
    backend = EchoBackend()
    up, golden = named(backend), str(tmp_path / "golden.jsonl.gz")
    assert qvl("parity", "record", up, *asked, "-o", golden)[0] == 0
    backend.requests = []
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"image": "red.png", "expected": {"brand": "NORVIK"}}))
    for words in (
        ["parity", up, down, *asked],
        ["parity", down, up, *asked],
        ["parity", "record", down, *asked, "-o", str(tmp_path / "other.jsonl.gz")],
        ["parity", "check", down, golden],
        ["eval", str(labels), "-m", "openai:echo-vl", "-O", up.split(",")[1], "-O", "api_key=x", "--against", down],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, done.output
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.output
        assert said(backend) == []


def test_a_golden_file_that_is_damaged_is_wrong_use(
    tmp_path: Path, asked: list[str], named: Callable[[EchoBackend], str]
) -> None:
    golden, b = tmp_path / "golden.jsonl.gz", named(EchoBackend())
    assert qvl("parity", "record", b, *asked, "-o", str(golden))[0] == 0
    whole = golden.read_bytes()
    for damaged, told in (
        (whole[:-7], f"is cut off in line {1 + 2 * QUESTIONS}, at byte"),
        (whole[:99], "is cut off in line 1, at byte 0"),
        (whole + b"more", f"is broken in line {2 + 2 * QUESTIONS}, at byte {len(whole)}"),
        (b"", "is not a record of qvl parity"),
        (b"{}", "is not a record of qvl parity"),
    ):
        golden.write_bytes(damaged)
        code, output = qvl("parity", "check", b, str(golden))
        assert code == 2
        assert told in output
    code, output = qvl("parity", "check", b, str(tmp_path / "none.gz"))
    assert (code, "cannot be opened: No such file" in output) == (2, True)


def test_what_failed_is_asked_again_by_the_same_command(
    tmp_path: Path, asked: list[str], named: Callable[[EchoBackend], str]
) -> None:
    a, b = EchoBackend(), AwayBackend()
    sides, golden = [named(a), named(b)], str(tmp_path / "golden.jsonl.gz")
    for words in (["parity", *sides, *asked], ["parity", "record", sides[1], *asked, "-o", golden]):
        a.requests, b.requests, b.away = [], [], ("n 3.", "n 7.")
        code, output = qvl(*words)
        assert code == 1
        assert "the same command asks those again" in output
        assert len(said(b)) == QUESTIONS - 2
        a.requests, b.requests, b.away = [], [], ()
        code, output = qvl(*words)
        assert code == 0, output
        assert (said(a), said(b)) == ([], ["Question 3.", "Question 7."])
    a.requests = []
    b.away = ("n 3.",)
    check = ["parity", "check", sides[1], golden]
    assert qvl(*check)[0] == 1
    b.away, b.requests = (), []
    assert (qvl(*check)[0], said(b)) == (0, ["Question 3."])


def test_pictures_that_are_not_there_are_refused_at_once(tmp_path: Path, asked: list[str]) -> None:
    for name, told in (("none.png", "no picture"), (".", "is a folder"), ("*.gif", "no file matches")):
        code, output = qvl("parity", DOWN, DOWN, "--pictures", str(tmp_path / name), "-q", "What?")
        assert code == 2
        assert told in output
    assert "no picture" in qvl("parity", "record", DOWN, "--pictures", "a.png", "-o", str(tmp_path / "g.gz"))[1]


@pytest.mark.slow
def test_the_bundled_model_has_a_name(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, it needs no notice, and is not the model of the settings."""
    monkeypatch.setenv("QVL_MODEL", "/no/such/folder")
    picture = asked[1]
    for words in (
        ["parity", "bundled", "local:bundled", "--pictures", picture, "-q", "What?", "--device", "cpu"],
        ["ask", picture, "What?", "-m", "bundled", "--device", "cpu", "--cache", "off"],
    ):
        code, output = qvl(*words)
        assert code == 0, output
        assert "no model named" not in output
