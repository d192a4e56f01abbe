"""`qvl cache`: what it lists, finds, explains and deletes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from qvl.cli.parse_args import duration
from qvl.errors import ConfigError


@pytest.fixture
def filled(qvl, pictures):
    """Keys of four answers: two pictures in English, one in Chinese, one question."""
    lines = [
        *qvl("analyze", *pictures[:2], "--json").lines,
        *qvl("analyze", pictures[0], "-l", "zh", "--json").lines,
        *qvl("ask", pictures[0], "How large?", "--json").lines,
    ]
    return [line["key"] for line in lines]


def test_path_is_the_file_and_the_variable_overrides_it(qvl, folder, monkeypatch):
    assert qvl("cache", "path").out.strip() == str(folder / "answers.db")
    monkeypatch.setenv("QVL_CACHE", "elsewhere.db")
    assert qvl("cache", "path").out.strip() == str(folder / "elsewhere.db")
    assert qvl("cache", "path", "--cache", "memory:").out.strip() == "memory:"


def test_stats_counts_by_model_language_and_task(qvl, filled):
    found = json.loads(qvl("cache", "stats", "--json").out)
    assert found["entries"] == 4
    assert found["by_task"] == {"chat": 1, "analyze": 3}
    assert found["by_language"] == {"en": 2, "zh": 1, "-": 1}
    assert found["by_model"] == {"grey": 4}
    assert "KiB" in qvl("cache", "stats").out


def test_list_is_newest_first_and_filtered(qvl, filled):
    assert qvl("cache", "list", "--json").lines[0]["key"] == filled[-1]
    assert len(qvl("cache", "list", "--json", "-n", "2").lines) == 2
    assert [line["key"] for line in qvl("cache", "list", "--json", "--language", "zh").lines] == [filled[2]]
    assert len(qvl("cache", "list", "--json", "--task", "analyze").lines) == 3
    assert filled[2].removeprefix("sha256-")[:12] in qvl("cache", "list").out


def test_list_says_enough_to_choose_by(qvl, filled, pictures):
    told = qvl("cache", "list").out
    assert "analyze (zh)" in told
    assert "NORVIK, mug, size 40x30" in told
    assert "How large?" in told
    for name in pictures[:2]:
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest()[:8] in told


def test_show_takes_the_start_of_a_key(qvl, filled):
    start = filled[0].removeprefix("sha256-")[:10]
    whole = json.loads(qvl("cache", "show", start, "--json").out)
    assert whole["key"] == filled[0]
    assert whole["analysis"]["brand"] == "NORVIK"
    assert "NORVIK" in qvl("cache", "show", filled[0][:20]).out


def test_show_has_the_question_and_the_sampling(qvl, filled):
    told = qvl("cache", "show", filled[3]).out
    assert "How large?" in told
    assert "[picture" in told
    assert "temperature" in told
    assert "json_schema" not in told


def test_explain_names_the_fields_that_differ(qvl, filled):
    found = json.loads(qvl("cache", "explain", filled[0], filled[2], "--json").out)
    fields = {difference["field"] for difference in found["differences"]}
    assert "language" in fields
    assert not any("image" in field for field in fields)
    found = json.loads(qvl("cache", "explain", filled[0], filled[1], "--json").out)
    assert all("parts[0]" in difference["field"] for difference in found["differences"])
    assert any("image" in difference["field"] for difference in found["differences"])
    assert "language" in qvl("cache", "explain", filled[0], filled[2]).out
    assert qvl("cache", "explain").out == qvl("cache", "explain", filled[2], filled[3]).out, "the two newest"
    alone = qvl("cache", "explain", filled[0])
    assert alone.code == 2
    assert "none for the two newest" in alone.error
    assert "no difference" in qvl("cache", "explain", filled[0], filled[0]).out


def test_a_key_that_is_not_there_or_not_the_only_one_is_wrong_use(qvl, filled):
    missing = qvl("cache", "show", "zzzz")
    assert missing.code == 2
    assert "no cached key" in missing.error
    several = qvl("cache", "show", "sha256-")
    assert several.code == 2
    assert "4 keys start with" in several.error


def test_clear_deletes_what_every_filter_matches(qvl, filled, folder):
    assert qvl("cache", "clear", "--language", "zh", "--model", "other").out.strip() == "deleted 0 answers"
    assert qvl("cache", "clear", "--language", "zh").out.strip() == "deleted 1 answer"
    old = time.time() - 8 * 86400
    with closing(sqlite3.connect(folder / "answers.db")) as db, db:
        db.execute("UPDATE entries SET created_at = ? WHERE key = ?", (old, filled[0]))
    assert qvl("cache", "clear", "--older-than", "9d").out.strip() == "deleted 0 answers"
    assert json.loads(qvl("cache", "clear", "--older-than", "7d", "--json").out) == {"deleted": 1}
    assert qvl("cache", "clear").out.strip() == "deleted 2 answers"
    assert json.loads(qvl("cache", "stats", "--json").out)["entries"] == 0


def test_a_cache_that_is_off_cannot_be_looked_into(qvl):
    ran = qvl("cache", "stats", "--cache", "off")
    assert ran.code == 2
    assert "the cache is off" in ran.error


def test_a_cache_that_cannot_be_opened_is_one_line(qvl, folder):
    (folder / "answers.db").mkdir()
    ran = qvl("cache", "stats")
    assert ran.code == 1
    assert "unable to open" in ran.error


@pytest.mark.parametrize(
    "command",
    [["stats"], ["stats", "--json"], ["list"], ["show", "ab"], ["explain"], ["explain", "ab", "cd"], ["clear"]],
)
def test_looking_into_a_cache_does_not_create_it(qvl, folder, command):
    named = qvl("cache", *command, "--cache", "nosuch.db")
    assert named.code == 2
    assert "no cache at" in named.error
    assert "qvl analyze … --cache nosuch.db" in named.error
    standing = qvl("cache", *command)
    assert standing.code == (2 if command[0] in ("show", "explain") else 0)
    assert list(folder.iterdir()) == []


def test_a_standing_cache_without_an_answer_yet_is_empty(qvl, folder):
    found = json.loads(qvl("cache", "stats", "--json").out)
    assert found["entries"] == 0
    assert found["cache"].endswith(f"{folder}/answers.db")
    assert qvl("cache", "clear").out.strip() == "deleted 0 answers"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("36h", 129_600), ("7d", 604_800), ("2w", 1_209_600), ("1d12h", 129_600)],
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "7 fortnights", "-7d", "7dd", "1e3"])
def test_what_is_no_duration_is_wrong_use(text, qvl):
    with pytest.raises(ConfigError, match="invalid duration"):
        duration(text)
    if not text.startswith("-"):
        assert qvl("cache", "clear", "--older-than", text).code == 2
