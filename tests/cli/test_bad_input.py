"""Everything wrong that can be typed: one line says what and the way out, and the exit code is the right one."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from qvl.errors import ConfigError, write_failed

from .conftest import install, make_picture


def png_of(width: int, height: int) -> bytes:
    """The head of a PNG that claims a size, with next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    Image.effect_noise((200, 200), 90).convert("RGB").save("whole.jpg")
    return Path("whole.jpg").read_bytes()[:2000]


BAD_PICTURES = {
    "missing file": ("gone.png", None, ["no such file", "gone.png"]),
    "folder": ("shop", "folder", ["is a folder", "glob"]),
    "empty file": ("empty.png", b"", ["empty.png"]),
    "truncated JPEG": ("cut.jpg", truncated_jpeg, ["cut.jpg"]),
    "text named .png": ("text.png", b"Dear customer,\n" * 20, ["text.png"]),
    "PNG bomb": ("bomb.png", lambda: png_of(30_000, 30_000), ["bomb.png", "pixels"]),
    "one pixel high": ("strip.png", lambda: png_of(1000, 1), ["strip.png", "200"]),
    "one pixel wide": ("pole.png", lambda: png_of(1, 1000), ["pole.png", "200"]),
    "SVG": ("logo.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', ["logo.svg"]),
    "unknown scheme": ("gopher://example.org/a.png", None, ["gopher", "http"]),
    "private address": ("http://127.0.0.1:9/a.png", None, ["127.0.0.1"]),
    "metadata address": ("http://169.254.169.254/latest", None, ["169.254.169.254"]),
    "base64 without its head": ("/9j/" + "A" * 600, None, ["base64", "data:"]),
    "data: URL of a text": ("data:text/plain;base64,aGVsbG8=", None, ["text/plain"]),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_one_line_and_exit_code_1(qvl, folder, case):
    name, content, words = BAD_PICTURES[case]
    if content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content())
    ran = qvl("analyze", name, "--json")
    assert ran.code == 1
    for word in words:
        assert word in ran.error
    (line,) = ran.lines
    assert not line["ok"]
    assert line["error"]["type"] == "MediaError"
    assert line["error"]["message"] in ran.error


WRONG_USE = {
    "unknown backend": (["--model", "parot:grey"], ["parot", "did you mean 'parrot'?"]),
    "unknown cache scheme": (["--cache", "rediss2://h/0"], ["rediss2", "did you mean 'rediss'?"]),
    "cache URL without its colon": (["--cache", "rediss//u:secret@h/0"], ["rediss//h/0", "did you mean rediss://h/0?"]),
    "misspelt cache URL without its colon": (["--cache", "sqlit///a.db"], ["did you mean sqlite:///a.db?"]),
    "cache file in no folder": (["--cache", "sqlite:///no/such/a.db"], ["folder of the cache file", "mkdir -p"]),
    "unknown cache word": (["--cache", "memori"], ["memori", "did you mean 'memory'?"]),
    "unknown cache mode": (["--cache-mode", "sometimes"], ["sometimes", "auto"]),
    "unknown parameter": (["--param", "temprature=1"], ["temprature", "did you mean 'temperature'?"]),
    "parameter out of range": (["-p", "temperature=-1"], ["temperature=-1", "from 0"]),
    "parameter of a wrong type": (["-p", "temperature=hot"], ["wrong type"]),
    "parameter without a value": (["-p", "temperature"], ["NAME=VALUE", "-param temperature="]),
    "backend's option without a value": (["-O", "max_retries"], ["NAME=VALUE", "--option max_retries="]),
    "setting of videos without a value": (["--video", "fps"], ["NAME=VALUE", "--video fps="]),
    "max_tokens of nothing": (["--max-tokens", "0"], ["max_tokens=0"]),
    "unknown option of the backend": (["-O", "sufix=x"], ["sufix", "did you mean 'suffix'?"]),
    "option that the backend lacks": (["--base-url", "http://h/v1"], ["base_url"]),
    "option that is the pipeline's": (["-O", "cache=off"], ["--option cache"]),
    "unknown language": (["--language", "tlh"], ["tlh", "en"]),
    "tiny budget of pixels": (["--max-pixels", "4"], ["--max-pixels 4"]),
    "schema without a class": (["--schema", "bills"], ["module:Class"]),
    "schema of no module": (["--schema", "no_such_module:Bill"], ["no_such_module"]),
    "schema of no class": (["--schema", "json:Bill"], ["'json'", "'Bill'"]),
    "schema that is no model": (["--schema", "json:JSONDecoder"], ["pydantic"]),
    "output in no folder": (["--output", "no/such/r.jsonl"], ["--output", "cannot be written"]),
    "report in no folder": (["--html", "no/such/r.html"], ["--html", "cannot be written"]),
    "report over a folder": (["--html", "."], ["--html", "cannot be written", "not a folder"]),
    "output over a folder": (["--output", "."], ["--output", "cannot be written", "not a folder"]),
    "output below a file": (["--output", "mug.png/r.jsonl"], ["--output", "Not a directory", "folder that exists"]),
    "output with an endless name": (["--output", "x" * 300], ["--output", "too long", "shorter name"]),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_one_line_and_exit_code_2(qvl, folder, picture, case):
    arguments, words = WRONG_USE[case]
    ran = qvl("analyze", picture, picture, "--json", *arguments)
    assert ran.code == 2
    assert ran.out == ""
    for word in words:
        assert word in ran.error
    assert "secret" not in ran.err
    assert [path.name for path in folder.iterdir()] == [picture], "a name misspelt leaves nothing behind"


def test_a_glob_without_a_match_is_wrong_use(qvl, folder):
    ran = qvl("analyze", "*.webp")
    assert ran.code == 2
    assert "no file matches '*.webp'" in ran.error


def test_stdin_can_be_named_once(qvl):
    assert "stdin" in qvl("analyze", "-", "-").error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to write to")
def test_a_full_disk_is_one_line(shell, picture):
    ran = shell("analyze", picture, picture, "--output", "/dev/full", "--json")
    assert ran.code == 1
    assert "--output /dev/full cannot be written: No space left on device (free some space" in ran.error
    with open("/dev/full", "w") as full:
        ran = shell("analyze", picture, "--json", stdout=full)
    assert ran.code == 1
    assert "the output cannot be written: No space left on device (free some space" in ran.error


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_file_that_grows_beyond_the_limit_is_one_line(qvl, picture, folder):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        ran = qvl("analyze", picture, "--html", "report.html", "--cache", "off")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 1
    assert "--html report.html cannot be written: File too large (" in ran.error
    assert "ulimit -f" in ran.error
    assert [path.name for path in folder.iterdir()] == [picture]


def test_what_is_used_up_is_told_from_what_is_named_wrongly():
    for number, word in ((errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EMFILE, "ulimit -n")):
        error = write_failed("x", OSError(number, os.strerror(number)))
        assert word in error.hint
        assert not isinstance(error, ConfigError)
    for number, word in ((errno.EACCES, "may write"), (errno.EROFS, "only be read"), (errno.ENOENT, "that exists")):
        error = write_failed("x", OSError(number, os.strerror(number)))
        assert word in error.hint
        assert isinstance(error, ConfigError)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no endless file")
def test_stdin_that_never_ends_is_refused(shell):
    with open("/dev/zero", "rb") as endless:
        ran = shell("analyze", "-", "--json", stdin=endless)
    assert ran.code == 1
    assert "more than the limit" in ran.error


def test_unknown_commands_and_options_are_wrong_use(shell):
    for arguments in (["analise"], ["analyze", "--jsno", "x.png"], ["ask"], ["analyze", "x.png", "-i", "0"]):
        ran = shell(*arguments)
        assert ran.code == 2
        assert ran.out == ""
        assert "Traceback" not in ran.err
    assert "analyze" in shell("analise").err


def test_a_missing_extra_names_its_pip_line(shell, picture, folder):
    (folder / "openai.py").write_text("raise ModuleNotFoundError(\"No module named 'openai'\", name='openai')\n")
    env = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    ran = shell("ask", picture, "Q", "--model", "openai:m", "--base-url", "http://127.0.0.1:9/v1", env=env)
    assert ran.code == 2
    assert "pip install" in ran.error


def test_max_tokens_beyond_the_context(qvl, picture):
    ran = qvl("ask", picture, "Q", "--max-tokens", "100000")
    assert ran.code == 1
    assert "the context has 4096" in ran.error
    assert "lower max_tokens" in ran.error


def test_a_prompt_that_does_not_fit(qvl, picture):
    ran = qvl("ask", picture, "why? " * 10_000, "--json")
    assert ran.code == 1
    assert ran.lines[0]["error"]["code"] == "context_length_exceeded"


def test_a_backend_that_is_down_fails_every_picture_and_says_why(qvl, picture):
    ran = qvl("analyze", picture, "--model", "parrot:down", "--json")
    assert ran.code == 1
    assert "nothing listens (start it)" in ran.error
    assert ran.lines[0]["error"]["retryable"] is True


def test_an_answer_that_is_no_analysis_keeps_the_raw_text(qvl, picture):
    ran = qvl("analyze", picture, "--model", "parrot:mute", "--json")
    assert ran.code == 1
    assert ran.lines[0]["error"]["type"] == "AnalysisError"
    assert ran.lines[0]["error"]["raw"] == "I would rather not say."


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "sqlite:////proc/answers.db"])
def test_a_cache_without_a_store_behind_it_is_a_warning(shell, picture, url):
    ran = shell("analyze", picture, "--cache", url, "--json")
    assert ran.code == 0
    assert ran.lines[0]["ok"]
    assert ran.lines[0]["cache"] in ("miss", "bypass")
    (line,) = ran.err.splitlines()
    assert "[warning" in line
    assert "cache" in line


def test_a_plugin_that_cannot_be_imported_is_a_warning_and_a_row(shell, picture, folder, plugin_folder):
    install(folder / "site", "squeaky", "squeaky_wheel")
    env = {"PYTHONPATH": os.pathsep.join([str(plugin_folder), str(folder / "site")])}
    ran = shell("analyze", picture, "--json", env=env)
    assert ran.code == 0
    assert len(ran.lines) == 1
    assert "squeaky" in ran.err
    listed = json.loads(shell("plugins", "--json", env=env).out)
    assert [plugin["plugin"] for plugin in listed["plugins"]] == ["qvl", "parrot"]
    assert listed["failures"][0]["name"] == "squeaky"
    assert "squeaky_wheel" in listed["failures"][0]["error"]
    assert "left out" in shell("plugins", env=env).out


def test_an_error_is_one_line_whatever_the_name_holds(qvl, folder):
    ran = qvl("analyze", "a\nb\x1bc.png")
    assert ran.code == 1
    assert "\x1b" not in ran.err
    assert len(ran.err.splitlines()) == 1


def test_the_error_is_red_on_a_terminal(shell, folder):
    ran = shell("analyze", "gone.png", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert ran.err.startswith("\x1b[1;31merror: ")
    assert make_picture("here.png", 8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "--nope", "x"], ["No such option: --nope", "qvl ask --help"]),
        (["--nope"], ["No such option: --nope", "(qvl --help)"]),
        (["analyse"], ["No such command 'analyse'"]),
        (["analyze"], ["Missing argument", "qvl analyze --help"]),
        (["ask", "x", "-i", "0"], ["--iterations", "greater than or equal to 1"]),
    ],
)
def test_wrong_use_is_one_line_that_names_the_help(qvl, arguments, words):
    ran = qvl(*arguments)
    assert ran.code == 2
    assert all(word in ran.error for word in words)
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "arguments", "near"),
    [
        ("cach = 'a.db'", ["analyze", "x.png"], "did you mean 'cache'?"),
        ("[serve]\nmax-queu = 7", ["serve"], "did you mean 'max_queue'?"),
        ("[serv]\nport = 7", ["serve"], "did you mean 'serve'?"),
    ],
)
def test_a_setting_that_is_none_is_told_with_the_nearest(qvl, folder, monkeypatch, text, arguments, near):
    (folder / "mine.toml").write_text(text)
    monkeypatch.setenv("QVL_CONFIG", "mine.toml")
    ran = qvl(*arguments)
    assert ran.code == 2
    assert "unknown setting" in ran.error
    assert "mine.toml" in ran.error
    assert near in ran.error


def test_a_group_alone_shows_its_help(qvl):
    ran = qvl("cache")
    assert ran.code == 2
    assert "explain" in ran.out + ran.err
    assert "error" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["mug.png"], 'qvl ask mug.png "What brand is it?"'),
        (["mug.png", "mug.png"], 'qvl ask mug.png mug.png "What brand is it?"'),
        (["mug.png", " "], 'qvl ask mug.png "What brand is it?"'),
        (["Which color?", "mug.png"], 'qvl ask mug.png "Which color?"'),
    ],
)
def test_a_picture_without_a_question_after_it_is_wrong_use(qvl, picture, arguments, hint):
    ran = qvl("ask", *arguments)
    assert ran.code == 2
    assert "no question about mug.png" in ran.error
    assert f"put it last: {hint}" in ran.error


def test_an_unknown_cache_is_told_of_paths_and_off(qvl, picture):
    ran = qvl("ask", picture, "What?", "--cache", "nonsense")
    assert ran.code == 2
    assert "or off" in ran.error


def test_an_option_of_the_pipeline_is_none_of_the_backend_for_the_server_too(qvl):
    ran = qvl("serve", "--option", "cache=off")

    assert ran.code == 2
    assert "--option cache" in ran.error


def test_mcp_refuses_a_port_that_does_not_exist(qvl):
    ran = qvl("mcp", "--transport", "http", "--port", "99999")

    assert ran.code == 2
    assert "--port" in ran.error
