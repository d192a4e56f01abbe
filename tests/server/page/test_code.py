"""Settings with a picture's tokens, and "Copy as": what is copied runs as pasted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.backends.local.backend import LocalBackend
from tests.media.films import film
from tests.media.papers import BAG, MUG, paper
from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture, start
from tests.server.page.conftest import drop, go, shot

PICTURES = Path(__file__).parents[3] / "examples" / "pictures"
ANSWER = ".turn.assistant .answer"
KIND_PATHS = {"analyze": "v1/analyze", "locate": "v1/locate", "decide": "v1/decisions"}
RUN = {
    "curl": ("sh", ["bash"]),
    "Python (qvl)": ("py", [sys.executable]),
    "Python (openai)": ("py", [sys.executable]),
    "JavaScript": ("mjs", ["node"]),
}


@pytest.fixture(scope="module")
def bundled():
    running = start(LocalBackend(), api_keys=("sesame",))
    yield running
    running.stop()


def enter(page, url: str) -> None:
    page.add_init_script("sessionStorage.setItem('qvl-key', 'sesame')")
    go(page, url)


def codes(page) -> dict[str, str]:
    """What the open dialog copies, by language."""
    found = {}
    for language in RUN:
        page.get_by_label(language, exact=True).check()
        page.locator("#code-copy button").click()
        page.locator("#code-copy button", has_text="Copied").wait_for()
        found[language] = page.evaluate("navigator.clipboard.readText()")
        assert found[language] == page.locator("#code").text_content()
    shot(page, "code")
    page.locator("#code-dialog").get_by_role("button", name="Close").click()
    return found


def ran(folder: Path, language: str, code: str) -> str:
    ending, command = RUN[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    path = folder / f"code.{ending}"
    path.write_text(code, encoding="utf-8")
    env = {**os.environ, "QVL_API_KEY": "sesame", "QVL_CACHE": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=250, env=env, cwd=folder)
    assert done.returncode == 0, f"{language}\n{done.stderr[-2000:]}\n{code[-1500:]}"
    return done.stdout


def test_the_tokens_of_a_picture_are_told_before_asking(page, bundled: Running) -> None:
    enter(page, bundled.url)
    assert page.is_visible("#bundled")
    page.click("#settings-button")
    assert "64" in page.inner_text("#can")
    page.get_by_role("button", name="Add sample-mug.png").click()
    page.locator("#pictures .count", has_text="16 tokens").wait_for()
    assert "sample-mug.png: 16 tokens" in page.inner_text("#picture-tokens")
    page.fill("#max_pixels", "12288")
    page.locator("#picture-tokens", has_text="sample-mug.png: 9 tokens").wait_for()
    shot(page, "settings")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    assert "(9 picture)" in page.inner_text(".turn .facts")
    page.fill("#temperature", "7")
    page.click("#send")
    assert page.inner_text("#error").startswith("Temperature: ")
    page.fill("#temperature", "0.5")
    page.reload()
    page.wait_for_selector("#state.ready")
    assert page.input_value("#temperature") == "0.5"
    page.click("#settings-button")
    page.click("#settings-reset")
    assert page.input_value("#temperature") == ""


def test_a_model_that_tells_no_tokens_is_reckoned_by_the_rule(page, serve) -> None:
    server: Running = serve()
    go(page, server.url)
    assert page.is_hidden("#bundled")
    drop(page, "large.png", picture("red", (1280, 960)))
    page.locator("#pictures .count", has_text="about 1200 tokens").wait_for()
    page.click("#settings-button")
    page.fill("#max_pixels", "262144")
    page.locator("#pictures .count", has_text="about 234 tokens").wait_for()
    page.select_option("#cache", "fresh")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    assert len(server.backend.requests) == 2


def test_a_conversation_as_code_runs_as_pasted(page, bundled: Running, tmp_path: Path) -> None:
    enter(page, bundled.url)
    page.click("#settings-button")
    page.fill("#system", 'Say "one" word.\nNo more.')
    page.fill("#max_tokens", "16")
    page.fill("#max_pixels", "16384")
    page.select_option("#cache", "fresh")
    drop(page, "mug.png", (PICTURES / "norvik-mug-red.png").read_bytes())
    page.wait_for_selector("#pictures img")
    page.fill("#question", 'What brand is it? It\'s "printed" on $HOME `x` \\ ü 商标')
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    said = page.inner_text(ANSWER)
    page.get_by_role("button", name="Copy as …").click()
    for language, code in codes(page).items():
        assert "sesame" not in code
        assert said in ran(tmp_path, language, code), language


def show(page, *names: str) -> None:
    """Adds files of the page's own making to the tab, a PDF for its second page."""
    page.set_input_files("#files", list(names))
    for name in names:
        if name.endswith(".pdf"):
            page.get_by_label(f"Pages of {Path(name).name}").fill("2")
    page.locator("#pictures li").nth(len(names) - 1).wait_for()
    page.wait_for_selector("#pictures .reading", state="detached")


# What is asked in a tab, and the files that are asked about, each by itself: its code must say what the page says.
ASKED = {
    "analyze": ("analyze", "mug.png"),
    "analyze with everything": ("analyze", "mug.png"),
    "a table of fields": ("analyze", "mug.png"),
    "a JSON schema": ("analyze", "mug.png"),
    "a page": ("analyze", "bill.pdf"),
    "a page with boxes": ("analyze", "bill.pdf"),
    "a video": ("analyze", "clip.webm"),
    "locate": ("locate", "mug.png"),
    "points": ("locate", "mug.png"),
    "locate on a page": ("locate", "bill.pdf"),
    "decide": ("decide", "mug.png"),
    "decide about a text": ("decide", None),
    "decide about a page and a text": ("decide", "bill.pdf"),
    "decide about a video": ("decide", "clip.webm"),
}


def fill(page, what: str) -> None:
    if what == "analyze with everything":
        page.select_option("#language", "pt")
        page.check("#where")
        page.click("#settings-button")
        for name, value in {"temperature": "0", "seed": "7", "max_tokens": "300", "max_pixels": "16384"}.items():
            page.fill(f"#{name}", value)
        page.select_option("#cache", "off")
    if what == "a table of fields":
        page.select_option("#schema-kind", "fields")
        page.get_by_label("Type of field 1").select_option("one of")
        page.get_by_label("Values of field 1").fill("NORVIK, ZELPHO")
    if what == "a JSON schema":
        page.select_option("#schema-kind", "json")
        fields = {"brand": {"type": ["string", "null"]}, "place": {"format": "box"}, "new": {"type": "boolean"}}
        page.fill("#schema", json.dumps({"type": "object", "properties": fields, "required": ["brand", "new"]}))
    if what == "a page with boxes":
        page.check("#where")
    if what == "points":
        page.fill("#targets", 'the brand\nthe "mug"')
        page.check("#points")
    if what.startswith("decide"):
        page.get_by_label("Question 1", exact=True).fill('Is it "red"?')
        page.click("#add-question")
        page.get_by_label("Question 2", exact=True).fill("Which colour?")
        page.get_by_label("Kind of question 2").select_option("choice")
        page.get_by_label("Answers of question 2").fill("red, blue")
        page.click("#add-question")
        page.get_by_label("Question 3", exact=True).fill("How worn?")
        page.get_by_label("Kind of question 3").select_option("score")
        page.get_by_label("Answers of question 3").fill("new, used, broken")
    if "text" in what:
        page.fill("#about", 'It\'s a "red" mug, $HOME `x` \\ ü 商标.\nScratched.')


def figures(found: dict) -> list[str]:
    """What every form of code prints of an answer: its texts, and its numbers to three places."""
    if "located" in found:
        return [f"{one[shape][axis]:.3f}" for one in found["located"] for shape in ("box", "point") if shape in one
                for axis in ("x1", "y1", "x", "y") if axis in one[shape]]  # fmt: skip
    if "answers" in found:
        shares = [one.get("probability") or one["probabilities"][0]["probability"] for one in found["answers"]]
        return [f"{share:.3f}" for share in shares]
    return [str(value) for value in found["analysis"].values() if isinstance(value, str)]


def words(found: dict) -> list[str]:
    """What qvl's client prints: it asks about each order of the options itself, so its shares differ a little."""
    if "answers" in found:
        return [one["name"] for one in found["answers"]]
    return figures(found)


def says(printed: str, figure: str) -> bool:
    """Numbers are printed with as many places as a language likes, and a batch changes their last bits."""
    if not re.fullmatch(r"-?[\d.]+", figure):
        return figure in printed
    return any(abs(float(one) - float(figure)) < 0.002 for one in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", printed))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ASKED)
def test_every_other_request_as_code_runs_as_pasted(page, bundled: Running, tmp_path: Path, what: str) -> None:
    tab, name = ASKED[what]
    shutil.copy(PICTURES / "norvik-mug-red.png", tmp_path / "mug.png")
    (tmp_path / "bill.pdf").write_bytes(paper([BAG, MUG]))
    film(tmp_path / "clip.webm", frames=8)
    enter(page, bundled.url)
    page.click(f"#tab-{tab}")
    if name:
        show(page, str(tmp_path / name))
    fill(page, what)
    with page.expect_response(f"**/{KIND_PATHS[tab]}") as answered:
        page.click(f"#{tab}")
    page.wait_for_selector(f"#{tab}:enabled")
    assert answered.value.status == 200
    told = answered.value.json()
    wanted = figures(told)
    assert wanted or "video" in what
    page.locator("#answer").get_by_role("button", name="Copy as …").click()
    for language, code in codes(page).items():
        printed = ran(tmp_path, language, code)
        expected = words(told) if language == "Python (qvl)" else wanted
        assert not [figure for figure in expected if not says(printed, figure)], (language, expected, printed[-3000:])


def test_a_conversation_with_a_page_and_a_video_as_code_runs_as_pasted(page, bundled: Running, tmp_path: Path) -> None:
    (tmp_path / "bill.pdf").write_bytes(paper([BAG, MUG]))
    film(tmp_path / "clip.webm", frames=8)
    enter(page, bundled.url)
    show(page, str(tmp_path / "bill.pdf"), str(tmp_path / "clip.webm"))
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    page.fill("#question", "And what is it?")
    page.click("#send")
    page.locator(ANSWER).nth(1).wait_for()
    page.wait_for_selector("#send:enabled")
    said = page.locator(ANSWER).nth(1).inner_text()
    page.get_by_role("button", name="Copy as …").nth(1).click()
    for language, code in codes(page).items():
        assert said in ran(tmp_path, language, code), language


def test_without_a_key_code_asks_for_none(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    page.fill("#question", "hello")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    page.get_by_role("button", name="Copy as …").click()
    assert all("QVL_API_KEY" not in code for code in codes(page).values())
    # On a page that is not secure the browser has no clipboard of its own.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy as …").click()
    page.get_by_label("curl", exact=True).check()
    page.locator("#code-copy button").click()
    page.locator("#code-copy button", has_text="Copied").wait_for()
