"""`qvl read`: documents as text, page by page; and documents in the other commands."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.media.papers import BAG, MUG, SHOE, locked, paper
from tests.scripted_endpoint import Echo, ScriptedEndpoint


@pytest.fixture
def bill() -> str:
    Path("bill.pdf").write_bytes(paper([MUG, BAG, SHOE]))
    return "bill.pdf"


def test_markdown_to_stdout_and_html_to_a_file(qvl, bill):
    ran = qvl("read", bill, "--pages", "1-2")
    assert ran.code == 0
    first, second = ran.out.split("<!-- Page 2 -->")
    assert first.startswith("<!-- Page 1 -->\n\n889x667: Write everything")
    assert "889x667" in second
    assert qvl("read", bill, "--pages", "1-2", "--json").lines[1]["cache"] == "hit"

    assert qvl("read", bill, "-o", "bill.html").code == 0
    written = Path("bill.html").read_text()
    assert written.count('<section class="page" data-page="') == 3
    assert 'data-page="3" data-width="889" data-height="667">' in written
    assert written.endswith("</body></html>\n")


def test_several_documents_go_into_a_folder(qvl, bill):
    Path("texts").mkdir()
    Path("other.pdf").write_bytes(paper([MUG]))
    Path("locked.pdf").write_bytes(locked())
    ran = qvl("read", "*.pdf", "-o", "texts", "--pages", "1")
    assert ran.code == 1, "one of them failed"
    assert "locked.pdf is encrypted" in ran.err
    assert sorted(path.name for path in Path("texts").iterdir()) == ["bill.md", "other.md"]
    refused = qvl("read", "*.pdf", "-o", "all.md")
    assert (refused.code, "one file for 3 documents" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("read", "bill.pdf", "--pages", "7"), 1, "has 3 pages, so there is no page 7"),
        (("read", "bill.pdf", "--pages", "x"), 2, "--pages='x' names no pages"),
        (("read", "bill.pdf", "--form", "latex"), 2, "unknown --form 'latex'"),
        (("read", "bill.pdf", "-o", "bill.docx"), 2, "bill.docx would be Markdown or HTML, not .docx"),
        (("read", "none.pdf"), 1, "no such file: none.pdf"),
        (("read", "bill.pdf", "-o", "nowhere/a.md"), 2, "nowhere"),
        (("ask", "bill.pdf#page=0", "q"), 1, "#page='0' names no pages"),
        (("locate", "bill.pdf", "mug"), 1, "places are told on one"),
    ],
)
def test_bad_input_is_one_line(qvl, bill, args, code, words):
    ran = qvl(*args)
    assert (ran.code, words in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err


def test_other_commands_take_documents(qvl, bill):
    assert qvl("ask", "bill.pdf#page=2", "What is it?").out.startswith("889x667: ")
    assert "889x667, 889x667" in qvl("ask", "b*.pdf", "What is it?", "--pages", "2-").out
    assert "889x667" in qvl("ask", "b*.pdf#page=1", "What is it?").out
    assert qvl("analyze", bill, "--pages", "3", "--json").lines[0]["analysis"]["attributes"]["size"] == "889x667"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_after_kill_9_only_the_missing_pages_are_asked_for(process, shell):
    pages, under_way = 50, 2
    Path("long.pdf").write_bytes(paper([f"This is page {number}" for number in range(1, pages + 1)]))
    with ScriptedEndpoint(default=Echo(pause=0.02)) as endpoint:
        args = ["read", "long.pdf", "-o", "long.md", "-j", str(under_way), "--max-pixels", "100000"]
        args += ["-m", "openai:echo", "--base-url", endpoint.url, "-O", "probe=false"]
        child = process(*args)
        end = time.monotonic() + 200
        while not Path("long.md").exists() or Path("long.md").read_text().count("<!-- Page") < 10:
            assert time.monotonic() < end, "ten pages never came"
            assert child.poll() is None, child.communicate()
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        before = len(endpoint.chats)
        assert 10 <= before < pages
        ran = shell(*args)
        assert ran.code == 0, ran.err
        text = Path("long.md").read_text()
        assert [text.count(f"<!-- Page {number} -->") for number in range(1, pages + 1)] == [1] * pages
        # What was being answered when the process died is asked for again, and nothing else.
        assert len(endpoint.chats) - before <= pages - before + 2 * under_way
        again = shell(*args, "--json")
        assert {json.loads(line)["cache"] for line in again.out.splitlines()} == {"hit"}
