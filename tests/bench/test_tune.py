"""`qvl tune`: the walk through a grid, resumption, bad input, and servers of this machine that it starts itself."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from qvl.bench import tune
from qvl.cli import app
from tests.server.processes import launch

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

# A small OpenAI-compatible server whose pace its flag sets; it logs each start, and dies where it is told to.
SERVER = r"""
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
words = sys.argv[1:]
open(words[1], "a").write(" ".join(words[2:]) + "\n")
if "--broken" in words: sys.exit("cannot allocate 3 GiB")
pause = float(words[words.index("--pause") + 1]) if "--pause" in words else 0.05
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *words): pass
    def answer(self, body):
        body = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self.answer({"object": "list", "data": [{"id": "m", "object": "model"}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"])); time.sleep(pause)
        if "--refuse" in words:
            self.send_response(400); self.send_header("Content-Length", "0"); self.end_headers(); return
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
        usage = {**chunk, "choices": [], "usage": {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301}}
        body = "".join(f"data: {json.dumps(part)}\n\n" for part in (chunk, usage)) + "data: [DONE]\n\n"
        self.send_response(200); self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body.encode())
ThreadingHTTPServer(("127.0.0.1", int(words[0])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> str:
    """The command of the server above, whose starts stand in tmp_path/starts."""
    (tmp_path / "server.py").write_text(SERVER)
    return shlex.join([sys.executable, str(tmp_path / "server.py"), "{port}", str(tmp_path / "starts")])


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["tune", *words], env={"QVL_API_KEY": None, "OPENAI_API_KEY": None})


def small(out: Path) -> list[str]:
    return ["--synthetic", "2", "--size", "64x64", "-n", "4", "-c", "2", "--out", str(out)]


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_fastest_value_is_found_and_written_as_a_recipe_that_can_be_run(server: str, tmp_path: Path) -> None:
    result = run("--launch", server, "--vary", "--pause=0.3,0.01", "--vary", "--quiet=-,+", *small(tmp_path / "out"))

    assert result.exit_code == 0, result.stderr
    recipe = json.loads((tmp_path / "out" / tune.RECIPE).read_text())
    assert recipe["best"]["flags"][:2] == ["--pause", "0.01"]
    assert "--pause 0.01" in recipe["command"]
    # One axis after the other: the second is tried with the best of the first.
    assert starts(tmp_path) == ["--pause 0.3", "--pause 0.01", "--pause 0.01 --quiet"]
    assert len(recipe["measured"]) == 3
    assert all(item["success_rate"] == 1 and item["e2e_p99"] > 0 for item in recipe["measured"])


def test_a_tuning_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    words = ["--launch", server, "--vary", "--pause=0.1,0.01", *small(tmp_path / "out")]
    assert run(*words).exit_code == 0
    # As if it had been killed within the second setting.
    (tmp_path / "out/setting-1/clients-2/summary.json").unlink()
    (tmp_path / "out" / tune.RECIPE).unlink()
    again = run(*words, "--resume")

    assert again.exit_code == 0, again.stderr
    assert starts(tmp_path) == ["--pause 0.1", "--pause 0.01", "--pause 0.01"]
    assert "measured before" in again.stderr
    assert run(*words).exit_code == 2
    other = run("--launch", server, "--vary", "--pause=0.1,0.02", *small(tmp_path / "out"), "--resume")
    assert other.exit_code == 2
    assert "measured something else: axes" in other.stderr


def test_ctrl_c_within_a_level_ends_the_server_and_resume_measures_that_level_anew(server: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--launch", f"{server} --tuned {{port}}", "--vary", "--pause=0.01,0.1", "--synthetic", "2"]
    words += ["--size", "64x64", "-n", "24", "-c", "1,2", "--out", str(out)]
    command = [sys.executable, "-m", "qvl.cli", "tune", *words]
    half = out / "setting-1/clients-1/results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: process.poll() is not None or (half.exists() and half.read_text().count("\n") >= 4))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith(f"--out {out} --resume goes on")
    assert not (out / tune.RECIPE).exists()
    assert not (out / "setting-1/clients-1/summary.json").exists()
    ports = [line.split()[1] for line in starts(tmp_path)]
    assert len(ports) == 2
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=5)

    again = run(*words, "--resume")

    assert again.exit_code == 0, again.stderr
    # The first setting was whole; the second is asked from the start, by a server of its own.
    assert [line.split()[-1] for line in starts(tmp_path)] == ["0.01", "0.1", "0.1"]
    assert "--pause 0.01: measured before" in again.stderr
    ids = [json.loads(line)["id"] for line in half.read_text().splitlines()]
    assert len([name for name in ids if not name.startswith("warmup")]) == 24
    recipe = json.loads((out / tune.RECIPE).read_text())
    assert [item["clients"] for item in recipe["measured"]] == [1, 2, 1, 2]
    assert recipe["best"]["flags"] == ["--pause", "0.01"]


def test_a_setting_with_which_the_server_dies_is_passed_over_with_its_last_line(server: str, tmp_path: Path) -> None:
    result = run("--launch", server, "--vary", "--broken=-,+", *small(tmp_path / "out"))
    alone = run("--launch", f"{server} --broken", *small(tmp_path / "dead"))

    assert result.exit_code == 0, result.stderr
    measured = json.loads((tmp_path / "out" / tune.RECIPE).read_text())["measured"]
    assert "exit code 1: cannot allocate 3 GiB" in measured[1]["error"]
    assert alone.exit_code == 1
    assert "no setting could be measured" in alone.stderr
    assert "cannot allocate 3 GiB" in alone.stderr


def test_settings_that_answer_too_few_requests_give_one_clear_line(server: str, tmp_path: Path) -> None:
    result = run("--launch", f"{server} --refuse", "--vary", "--pause=0.01,0.02", *small(tmp_path / "out"))

    assert result.exit_code == 1
    assert "no setting answered 99% of its requests; the best answered 0.0%" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / tune.RECIPE).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to tune"),
        (["--url", "http://127.0.0.1:1/v1", "--vary", "--a=1,2"], "cannot be varied"),
        (["--launch", "qvl-serve"], "no {port}"),
        (["--launch", "qvl-serve --port '{port}"], "cannot be read"),
        (["--launch", "none-such {port}"], "none-such"),
        (["--launch", "x {port} --a 3", "--vary", "--a=1,2"], "both varied"),
        (["--launch", "x {port}", "--vary", "--a=1", "--vary", "--a=2"], "varied twice"),
        (["--launch", "x {port}", "--vary", "a=1"], "cannot be read"),
        (["--launch", "x {port}", "--vary", "--a=1,,2"], "cannot be read"),
        (["--launch", "x {port}", "--vary", "--a=1,1"], "twice"),
        (["--launch", "x {port}", "--grid", "sglang"], "--grid"),
        (["--url", "http://127.0.0.1:1/v1", "-c", "1,x"], "--concurrency"),
        (["--url", "http://127.0.0.1:1/v1", "-c", "0"], "--concurrency"),
        (["--url", "http://127.0.0.1:1/v1", "--slo", "speed=1"], "--slo"),
        (["--url", "http://127.0.0.1:1/v1", "--resume"], "--out"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    out = [] if "--resume" in words else ["--out", str(tmp_path / "out")]
    result = run(*words, *out)

    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_qvl_serve_with_the_bundled_model_is_tuned(tmp_path: Path) -> None:
    serve = shlex.join([sys.executable, "-m", "qvl.cli.serve", "--device", "cpu", "--cache", "off", "--port", "{port}"])
    result = run(
        "--launch", serve, "--vary", "--max-num-seqs=1,8", "--slo", "e2e=60s", "--synthetic", "8", "--size", "64x64",
        "-n", "16", "-c", "1,8", "--max-tokens", "16", "--out", str(tmp_path / "out"),
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    recipe = json.loads((tmp_path / "out" / tune.RECIPE).read_text())
    assert len(recipe["measured"]) == 4
    assert all(item["success_rate"] == 1 for item in recipe["measured"])
    assert recipe["best"]["flags"] in (["--max-num-seqs", "1"], ["--max-num-seqs", "8"])
    assert "--port 8000" in recipe["command"]


@pytest.mark.slow
def test_a_running_qvl_serve_is_measured_at_each_number_of_clients(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--synthetic", "4", "--size", "64x64", "-n", "8", "-c", "4,1", "--max-tokens", "8", "--out", str(out)]
    process = launch("--device", "cpu", "--cache", "off", "--max-num-seqs", "4")
    try:
        process.wait_ready()
        result = run("--url", f"{process.address}/v1", "--slo", "e2e=60s", *words)
        again = run("--url", f"{process.address}/v1", "--slo", "e2e=60s", *words, "--resume", "--json")
    finally:
        process.end()

    assert result.exit_code == 0, result.stderr
    recipe = json.loads((out / tune.RECIPE).read_text())
    assert [item["clients"] for item in recipe["measured"]] == [1, 4]
    assert all(item["flags"] == [] and item["success_rate"] == 1 for item in recipe["measured"])
    assert recipe["command"] is None
    assert recipe["score"] == "goodput_requests_per_second"
    assert recipe["best"]["score"] == max(item["score"] for item in recipe["measured"]) > 0
    assert "best: as it is" in result.stdout
    # Nothing is left to ask.
    assert again.exit_code == 0, again.stderr
    assert "measured before" in again.stderr
    assert json.loads(again.stdout)["measured"] == recipe["measured"]
