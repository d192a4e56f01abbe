"""`qvl analyze` and `qvl ask`: what they print, write and remember."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest


def test_analyze_prints_fields_confidence_stages_and_the_line_of_time(qvl, picture):
    ran = qvl("analyze", picture)
    assert ran.code == 0
    for word in ("brand", "NORVIK", "category", "mug", "64x48", "%", "time: media", "model", "total"):
        assert word in ran.out
    assert re.search(r"^image analysis took \d+\.\d\d s \(cache miss\)$", ran.out, re.MULTILINE)
    assert ran.err == ""


def test_the_stages_add_up_to_the_total(qvl, picture):
    def times(out):
        rows = re.findall(r"time: ([\w ]+?) +│ +│ +([\d.]+) (ms|s) │", out)
        return {label: float(value) / (1000 if unit == "ms" else 1) for label, value, unit in rows}

    found = times(qvl("analyze", picture, "-i", "1").out)
    total = found.pop("total")
    assert {"media", "model"} <= set(found)
    assert sum(found.values()) == pytest.approx(total, rel=0.05)
    assert set(times(qvl("analyze", picture).out)) <= {"media", "cache", "start", "total"}


def test_a_question_does_not_call_itself_an_analysis(qvl, picture):
    assert re.search(r"^answer took \d+\.\d\d s \(cache miss\)$", qvl("ask", picture, "What?").out, re.MULTILINE)


def test_the_second_run_is_a_hit_with_the_same_answer(qvl, picture):
    first, second = (qvl("analyze", picture, "--json").lines[0] for _ in range(2))
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert first["analysis"] == second["analysis"]
    assert first["key"] == second["key"]
    assert first["request_id"] != second["request_id"]


def test_iterations_show_a_miss_then_hits(qvl, picture):
    ran = qvl("analyze", picture, "-i", "3")
    assert re.findall(r"\(cache (\w+)\)", ran.out) == ["miss", "hit", "hit"]
    assert [line["iteration"] for line in qvl("analyze", picture, "-i", "2", "--json").lines] == [1, 2]


def test_json_is_one_object_a_picture_in_input_order(qvl, pictures):
    ran = qvl("analyze", *pictures, "--json")
    assert [line["picture"] for line in ran.lines] == pictures
    assert [line["analysis"]["attributes"]["size"] for line in ran.lines] == [f"4{n}x30" for n in range(5)]
    line = ran.lines[0]
    assert set(line) >= {"ok", "confidence", "field_confidence", "confidence_method", "model", "backend", "usage"}
    times = line["timing"]
    assert set(times) == {"media", "decoding", "cache", "loading", "queue", "first_token", "total"}
    assert 0 < times["decoding"] < times["media"] < times["total"]
    (loaded,) = [line["timing"] for line in ran.lines if line["timing"]["loading"]]
    assert loaded["loading"] < loaded["total"]
    assert 0 < line["field_confidence"]["brand"] < 1


def test_a_glob_is_expanded_and_its_bar_is_on_stderr(qvl, pictures):
    ran = qvl("analyze", "shelf-*.png", "--json")
    assert [line["picture"] for line in ran.lines] == pictures
    assert "5/5" in ran.err


def test_several_pictures_are_one_table_and_a_count(qvl, pictures):
    ran = qvl("analyze", *pictures)
    assert all(name in ran.out for name in pictures)
    assert "5 pictures: 5 done (0 cache hits), 0 failed" in ran.out


def test_a_failed_picture_does_not_stop_the_others(qvl, pictures, folder):
    ran = qvl("analyze", pictures[0], "gone.png", pictures[1], "--json")
    assert ran.code == 1
    assert [line["ok"] for line in ran.lines] == [True, False, True]
    assert ran.lines[1]["error"]["type"] == "MediaError"
    assert "gone.png" in ran.error


def test_output_holds_the_same_lines_as_json(qvl, pictures, folder):
    ran = qvl("analyze", *pictures, "nothing.png", "--json", "--output", "results.jsonl")
    kept = [json.loads(line) for line in Path("results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == ran.lines
    assert [line["ok"] for line in kept] == [True] * 5 + [False]


def test_html_report_is_self_contained_and_escapes(qvl, picture, folder):
    picture = str(Path(picture).rename("<b>mug & co.png"))
    ran = qvl("analyze", picture, "lost.png", "--html", "report.html")
    page = Path("report.html").read_text(encoding="utf-8")
    assert ran.code == 1
    assert page.startswith("<!doctype html>")
    assert "data:image/" in page
    assert "NORVIK" in page
    assert "lost.png" in page
    assert "&lt;b&gt;mug &amp; co.png" in page
    assert "<b>mug" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_ask_answers_about_each_picture(qvl, pictures):
    ran = qvl("ask", pictures[0], pictures[1], "How large?", "--json")
    assert [line["text"] for line in ran.lines] == ["40x30: How large?", "41x30: How large?"]


def test_together_shows_all_pictures_in_one_request_in_their_order(qvl, pictures):
    ran = qvl("ask", pictures[1], pictures[0], "Which?", "--together", "--json")
    assert [line["text"] for line in ran.lines] == ["41x30, 40x30: Which?"]


def test_ask_prints_the_answer_and_the_stages(qvl, picture):
    ran = qvl("ask", picture, "How large?")
    assert ran.out.startswith("64x48: How large?\n")
    assert "model" in ran.out
    assert "(cache miss)" in ran.out


def test_ask_needs_no_picture(qvl):
    assert qvl("ask", "Hello there", "--json").lines[0]["text"] == ": Hello there"


def test_a_picture_from_stdin(qvl, picture):
    ran = qvl("ask", "-", "How large?", "--json", stdin=Path(picture).read_bytes())
    assert ran.lines[0]["text"] == "64x48: How large?"
    assert ran.lines[0]["picture"] == "<stdin>"


def test_a_data_url_is_a_picture(qvl, picture):
    url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    assert qvl("ask", url, "How large?", "--json").lines[0]["text"] == "64x48: How large?"


def test_stream_prints_the_answer_once_and_a_hit_alike(qvl, picture):
    for state in ("miss", "hit"):
        ran = qvl("ask", picture, "How large?", "--stream")
        assert ran.out.startswith("64x48: How large?\n")
        assert ran.out.count("How large?") == 1
        assert f"(cache {state})" in ran.out


def test_stream_as_json_is_pieces_and_then_the_whole(qvl, picture):
    *pieces, whole = qvl("ask", picture, "How large?", "--stream", "--json").lines
    assert len(pieces) > 1
    assert "".join(piece["delta"] for piece in pieces) == whole["text"] == "64x48: How large?"
    assert {piece["request_id"] for piece in pieces} == {whole["request_id"]}


def test_language_changes_the_key(qvl, picture):
    english, chinese = (qvl("analyze", picture, "-l", name, "--json").lines[0] for name in ("en", "zh"))
    assert chinese["cache"] == "miss"
    assert english["key"] != chinese["key"]
    assert chinese["analysis"]["language"] == "zh"


def test_a_schema_of_ones_own(qvl, picture, folder):
    Path("bills.py").write_text(
        "from pydantic import BaseModel\nclass Bill(BaseModel):\n    total: float\n    seller: str\n"
    )
    ran = qvl("analyze", picture, "--schema", "bills:Bill", "--json")
    assert ran.lines[0]["analysis"] == {"total": 12.5, "seller": "64x48"}
    assert "12.5" in qvl("analyze", picture, "--schema", "bills:Bill").out
    Path("forms").mkdir()
    Path("bills.py").rename("forms/moved_bills.py")
    assert "12.5" in qvl("analyze", picture, "--schema", "forms/moved_bills.py:Bill").out
    assert "no file 'forms/bills.py'" in qvl("analyze", picture, "--schema", "forms/bills.py:Bill").error


@pytest.mark.parametrize("leaving", ["raise SystemExit", "import sys; sys.exit(3)"])
def test_a_module_that_leaves_is_no_schema(qvl, picture, folder, leaving):
    name = f"leaves_{len(leaving)}"
    Path(f"{name}.py").write_text(leaving)
    ran = qvl("analyze", picture, "--schema", f"{name}.py:Bill")
    assert ran.code == 2
    assert f"module '{name}' of --schema cannot be imported: SystemExit" in ran.error


def test_backend_options_and_max_pixels_reach_the_backend(qvl, picture):
    ran = qvl("ask", picture, "Q", "-O", "suffix=!", "--device", "cpu", "--max-pixels", "1024", "--json")
    assert ran.lines[0]["text"] == "36x27: Q!"


def test_cache_modes(qvl, picture):
    assert qvl("ask", picture, "Q", "--cache", "off", "--json").lines[0]["cache"] == "bypass"
    states = [
        qvl("ask", picture, "Q", "--cache-mode", mode, "--json").lines[0]["cache"]
        for mode in ("auto", "auto", "refresh", "off")
    ]
    assert states == ["miss", "hit", "miss", "bypass"]


def test_sampled_answers_are_not_kept_unless_seeded(qvl, picture):
    ask = ("ask", picture, "Q", "--json", "-p", "temperature=0.7")
    assert [qvl(*ask).lines[0]["cache"] for _ in range(2)] == ["bypass", "bypass"]
    assert [qvl(*ask, "-p", "seed=1").lines[0]["cache"] for _ in range(2)] == ["miss", "hit"]


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_verbose_logs_carry_the_request_id_from_start_to_end(shell, picture, extra):
    ran = shell("analyze", picture, "--verbose", "--output", "kept.jsonl", *extra)
    assert ran.code == 0
    request_id = json.loads(Path("kept.jsonl").read_text())["request_id"]
    started, done = (
        [line for line in ran.err.splitlines() if event in line] for event in ("request started", "request done")
    )
    assert len(started) == len(done) == 1
    assert request_id in started[0]
    assert request_id in done[0]
    if extra:
        assert len(ran.lines) == 1
        assert all(json.loads(line)["level"] == "info" for line in ran.err.splitlines())
