"""How a run ends early: Ctrl-C and closed pipes keep what was done and print no traceback."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from .conftest import make_picture


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_ctrl_c_keeps_what_was_done_and_ends_with_130(process, shell, folder):
    names = [make_picture(f"{number:02}.png", 20 + number, 20) for number in range(40)]
    child = process(
        "analyze", *names, "--model", "parrot:slow", "-j", "1", "--output", "kept.jsonl", "--html", "report.html"
    )
    wait_for(Path("kept.jsonl"))
    assert Path("kept.jsonl").read_text().count("\n") < 8, "lines are written as they come, not by the buffer"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    assert 1 <= len(kept) < 40
    assert f"interrupted: {len(kept)} of 40 done" in err
    assert Path("report.html").read_text().count("<article") == len(kept)
    again = shell("analyze", *names[: len(kept)], "--model", "parrot:slow", "--json")
    assert {line["cache"] for line in again.lines} == {"hit"}


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_the_bar_counts_what_was_done_and_not_what_was_cut_off(process, pictures):
    child = process("analyze", *pictures, "--model", "parrot:stuck")
    wait_for(Path("asked"))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted: 0 of 5 done" in err
    assert "0/5" in err
    assert "5/5" not in err


def test_a_closed_pipe_is_a_quiet_end(process, folder):
    names = [make_picture(f"{number:02}.png", 20 + number, 20) for number in range(30)]
    reader, writer = os.pipe()
    child = process("analyze", *names, "--json", "-i", "20", stdout=writer)
    os.close(writer)
    assert os.read(reader, 10)
    os.close(reader)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 141
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.slow
def test_a_pipe_that_was_closed_before_the_first_answer(process, folder, picture):
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["analyze", picture], ["ask", picture, "Q", "--stream"], ["plugins"], ["cache", "stats"]):
        child = process(*arguments, stdout=os.dup(writer))
        _, err = child.communicate(timeout=60)
        assert child.returncode == 141
        assert "Traceback" not in err
        assert "Exception ignored" not in err
    os.close(writer)
