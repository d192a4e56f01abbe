"""`qvl chat`: a conversation through a pipe and in a terminal; how a line's pictures and text are told apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvl.cli.conversation import read_line
from tests.scripted_endpoint import ScriptedEndpoint, Status, Text

from .conftest import make_picture


@pytest.mark.parametrize(
    ("line", "pictures", "text"),
    [
        ("What is it?", [], "What is it?"),
        ("a.png", ["a.png"], ""),
        ("a.png What is it?", ["a.png"], "What is it?"),
        ("What is it? a.png", ["a.png"], "What is it?"),
        ("What is in a.JPG?", ["a.JPG"], "What is in picture 1?"),
        ("compare a.png with b.webp, please", ["a.png", "b.webp"], "compare picture 1 with picture 2, please"),
        ("a.png b.png which is larger?", ["a.png", "b.png"], "which is larger?"),
        ("'my mug.png' what?", ["my mug.png"], "what?"),
        (r"my\ mug.png what?", ["my mug.png"], "what?"),
        ("it's \"quoted\", isn't it?", [], "it's \"quoted\", isn't it?"),
        ("bill.pdf#page=2-3 the total?", ["bill.pdf#page=2-3"], "the total?"),
        ("https://shop.example/p?id=3 what?", ["https://shop.example/p?id=3"], "what?"),
        ("data:image/png;base64,iVBO what?", ["data:image/png;base64,iVBO"], "what?"),
        ("  spaces   stay in plain text", [], "  spaces   stay in plain text"),
    ],
)
def test_a_line_is_its_pictures_and_its_text(line: str, pictures: list[str], text: str) -> None:
    assert read_line(line) == (pictures, text)


def test_a_file_of_any_name_is_a_picture_if_it_is_the_whole_line(tmp_path: Path) -> None:
    (tmp_path / "no suffix").write_bytes(b"x")
    assert read_line(str(tmp_path / "no suffix")) == ([str(tmp_path / "no suffix")], "")


def test_every_turn_is_sent_with_its_own_pictures(qvl, picture):
    make_picture("second.png", 32, 32)
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Text("a mug"), Text("smaller"), Text("red"))
        ran = qvl(
            "chat", "mug.png", "-s", "Be brief.", "-m", "openai:m", "--base-url", endpoint.url, "-O", "probe=false",
            stdin=b"What is it?\nsecond.png\nAnd this?\n/system Be rude.\n/clear\nColour?\nquit\nnever asked\n",
        )  # fmt: skip
        asked = [got.body["messages"] for got in endpoint.requests if got.path.endswith("/chat/completions")]
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "a mug", "1 picture read; ask about it", "smaller", "system prompt: Be rude.", "a new conversation", "red"
    ]  # fmt: skip
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]
    ]  # fmt: skip
    assert [json.dumps(messages).count("data:image/png") for messages in asked] == [1, 2, 0]
    assert asked[2][0]["content"] == "Be rude."


def test_what_failed_is_said_forgotten_and_counted(qvl):
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Status(400, "no"), Text("fine"))
        ran = qvl(
            "chat", "-m", "openai:m", "--base-url", endpoint.url, "-O", "probe=false",
            stdin=b"one\nlost.png x\n/no\ntwo\n",
        )  # fmt: skip
        asked = [got.body["messages"] for got in endpoint.requests if got.path.endswith("/chat/completions")]
    assert ran.code == 1
    assert ran.out == "fine\n"
    assert [line.split(":")[0] for line in ran.err.splitlines()] == ["error"] * 3
    assert "no such file: lost.png" in ran.err
    assert "unknown command /no" in ran.err
    assert [message["content"] for message in asked[-1]] == ["two"]


@pytest.mark.parametrize("arguments", [["-"], ["-p", "n=2"], ["gone.png"]])
def test_wrong_use_is_one_line(qvl, arguments):
    ran = qvl("chat", *arguments, stdin=b"hello\n")
    assert ran.code == (1 if arguments == ["gone.png"] else 2)
    assert ran.error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_up_brings_a_line_back(process, folder):
    ours, its = os.openpty()
    child = process("chat", "-m", "parrot:stuck", stdin=its, stdout=its, env={"TERM": "xterm", "QVL_CACHE": "off"})
    try:
        said = b""

        def until(word: bytes) -> None:
            nonlocal said
            while word not in said:
                said += os.read(ours, 1000)
            said = said.partition(word)[2]

        until(b"> ")
        os.write(ours, b"first question\n")
        for _ in range(2):
            end = time.monotonic() + 60
            while not Path("asked").exists():
                assert time.monotonic() < end
                time.sleep(0.05)
            Path("asked").unlink()
            child.send_signal(signal.SIGINT)
            until(b"> ")
            os.write(ours, b"\x1b[A\n")
        until(b"first question")
        while not Path("asked").exists():
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        until(b"> ")
        os.write(ours, b"\x04")
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        os.close(ours)
        os.close(its)
    assert child.returncode == 0
    assert err.count("(stopped)") == 3
    assert "Traceback" not in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_each_shell_is_printed(shell: str) -> None:
    """By the variable that the installed script sets, as the shell itself asks for it."""
    env = {**os.environ, "_QVL_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "qvl.cli"], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert {"bash": "complete -o default -F", "zsh": "#compdef qvl", "fish": "complete --command qvl"}[
        shell
    ] in done.stdout


def test_completion_knows_the_commands() -> None:
    env = {**os.environ, "_QVL_COMPLETE": "complete_bash", "COMP_WORDS": "qvl ch", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qvl.cli"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["chat"]
