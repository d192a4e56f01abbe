"""The conversation on the page: turns with pictures, stop, edit, reasoning, Markdown, sharing, history, a lost line."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

from qvl.types import ChatRequest, Chunk, Usage
from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import Line, drop, go, shot

ANSWER = ".turn.assistant .answer"
HOSTILE = """# Title <script>alert(1)</script>

- one **bold** and *light*, `code <b>`
- two
  1. inner

> said <img src=x onerror="document.body.dataset.hit = 1">

| name | much |
|:---|---:|
| mug \\| cup | 12.50 |
| <b>hat</b> | 7 |

```python
print("a" < "b")
```

[a link](https://example.org/a?b=1) [bad](javascript:alert(1)) ![pixel](http://127.0.0.2:1/p.png)

snake_case_name and 2 * 3 * 4 stay."""


class Thinking(TalkingBackend):
    """Thinks before it answers."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk(reasoning="The plate says <b>NORVIK</b>.")
        yield Chunk(text="NORVIK")
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=8, reasoning_tokens=7))


def say(page, text: str) -> None:
    page.fill("#question", text)
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    page.wait_for_selector(".turn.assistant:last-child .facts dd")


def test_turns_have_pictures_of_their_own_and_the_whole_is_asked(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    page.click("#settings-button")
    page.fill("#system", "Be brief.")
    drop(page, "red.png", picture("red"))
    page.wait_for_selector("#pictures img")
    say(page, "what is it")
    drop(page, "blue.png", picture("blue"))
    page.wait_for_selector("#pictures img")
    say(page, "and this")
    last = server.backend.requests[-1]
    assert [(message.role, message.text) for message in last.messages] == [
        ("system", "Be brief."),
        ("user", "what is it"),
        ("assistant", "1:what is it"),
        ("user", "and this"),
    ]
    assert len(last.pictures) == 2
    assert page.locator(".turn.user img").count() == 2
    shot(page, "conversation")


def test_an_edited_turn_is_asked_anew_and_what_followed_is_gone(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    drop(page, "red.png", picture("red"))
    page.wait_for_selector("#pictures img")
    say(page, "first")
    say(page, "second")
    assert page.locator(".turn").count() == 4
    page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    shot(page, "edit")
    page.fill(".turn.edited textarea", "changed")
    page.locator(".turn.edited").get_by_role("button", name="Send").click()
    page.locator(ANSWER, has_text="1:changed").wait_for()
    page.wait_for_selector("#send:enabled")
    assert page.locator(".turn").count() == 2
    assert [message.text for message in server.backend.requests[-1].messages] == ["changed"]


def test_an_answer_is_regenerated_past_the_cache(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    say(page, "hello")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector(".turn.assistant .facts dd")
    page.wait_for_selector("#send:enabled")
    assert len(server.backend.requests) == 2


def test_a_stopped_answer_stays_as_far_as_it_came(page, serve) -> None:
    server: Running = serve(EchoBackend(pause=0.1))
    go(page, server.url)
    page.fill("#question", " ".join(f"word{number}" for number in range(200)))
    page.click("#send")
    page.locator(ANSWER, has_text="word1").wait_for()
    page.click("#stop")
    page.locator(".turn .facts", has_text="stopped").wait_for()
    assert "word0 word1" in page.inner_text(ANSWER)
    assert page.is_hidden("#error")
    assert page.is_enabled("#send")
    assert page.is_hidden("#stop")


def test_reasoning_is_folded(page, serve) -> None:
    server: Running = serve(Thinking())
    go(page, server.url)
    say(page, "what brand")
    assert page.inner_text(ANSWER) == "NORVIK"
    assert not page.is_visible(".reasoning")
    page.click(".thought summary")
    assert page.inner_text(".reasoning") == "The plate says <b>NORVIK</b>."


def test_markdown_is_shown_and_nothing_of_it_runs(page, serve) -> None:
    server: Running = serve(TalkingBackend(reply=lambda request: HOSTILE))
    go(page, server.url)
    say(page, "all of it")
    answer = page.locator(ANSWER)
    assert answer.locator("h3").inner_text() == "Title <script>alert(1)</script>"
    assert answer.locator("ul > li").count() == 2
    assert answer.locator("ul ol li").inner_text() == "inner"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("td").all_inner_texts() == ["mug | cup", "12.50", "<b>hat</b>", "7"]
    assert answer.locator("pre code").inner_text() == 'print("a" < "b")'
    assert answer.locator("blockquote").inner_text().startswith("said <img")
    assert [link.get_attribute("href") for link in answer.locator("a").all()] == [
        "https://example.org/a?b=1",
        "http://127.0.0.2:1/p.png",
    ]
    assert answer.locator("script, img").count() == 0
    assert "[bad](javascript:alert(1))" in answer.inner_text()
    assert "snake_case_name and 2 * 3 * 4 stay." in answer.inner_text()
    assert page.evaluate("document.body.dataset.hit") is None
    shot(page, "markdown")
    page.get_by_role("button", name="Copy table").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "name\tmuch\nmug | cup\t12.50\n<b>hat</b>\t7"
    page.locator(".code-block button").click()
    page.locator(".code-block button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("a" < "b")'


def test_a_conversation_is_saved_as_json_and_opened_elsewhere(page, browser, serve, tmp_path: Path) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    drop(page, "red.png", picture("red"))
    page.wait_for_selector("#pictures img")
    say(page, "what is it")
    with page.expect_download() as waiting:
        page.click("#share")
    saved = tmp_path / "conversation.json"
    waiting.value.save_as(saved)
    # Its messages are the API's.
    told = json.loads(saved.read_text())
    assert server.post("/v1/chat/completions", {"messages": told["messages"][:1]}).status_code == 200
    other = browser.new_context().new_page()
    go(other, server.url)
    other.set_input_files("#conversation-file", str(saved))
    other.locator(ANSWER, has_text="1:what is it").wait_for()
    say(other, "and now")
    assert [len(server.backend.requests[-1].pictures), server.backend.requests[-1].messages[-1].text] == [1, "and now"]
    for text, why in (
        ("{", "it is not JSON"),
        ('{"a": 1}', '"format"'),
        (json.dumps({**told, "version": 9}), "version"),
    ):
        other.set_input_files("#conversation-file", {"name": "x.json", "mimeType": "", "buffer": text.encode()})
        other.locator("#error", has_text=why).wait_for()
    foreign = {
        **told,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}],
    }
    other.set_input_files(
        "#conversation-file", {"name": "x.json", "mimeType": "", "buffer": json.dumps(foreign).encode()}
    )
    other.locator("#error", has_text="not in the file: http://a/b").wait_for()
    other.context.close()


def test_a_lost_line_is_told_and_what_came_is_kept(page, serve, line: list[Line]) -> None:
    server: Running = serve(EchoBackend(pause=0.1))
    line.append(Line(server.port))
    go(page, f"http://127.0.0.1:{line[0].port}")
    page.fill("#question", " ".join(f"word{number}" for number in range(300)))
    page.click("#send")
    page.locator(ANSWER, has_text="word1").wait_for()
    line[0].cut()
    page.locator(".turn .failed", has_text="The connection was lost").wait_for()
    assert "word0 word1" in page.inner_text(ANSWER)
    page.fill("#question", "more")
    page.click("#send")
    page.locator("#error", has_text="cannot be reached").wait_for()
    assert page.input_value("#question") == "more"
    page.wait_for_selector("#send:enabled")


def test_the_history_outlives_the_page_and_can_be_cleared(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    drop(page, "red.png", picture("red"))
    page.wait_for_selector("#pictures img")
    say(page, "what is it")
    page.locator("#history .entry").wait_for(state="attached")
    page.click("#new")
    say(page, "another one")
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    page.locator("#history .entry").nth(1).wait_for()
    assert page.locator("#history .said").all_inner_texts() == ["another one", "what is it"]
    page.locator("#history .entry", has_text="what is it").click()
    page.locator(ANSWER, has_text="1:what is it").wait_for()
    assert page.evaluate("document.querySelector('.turn.user img').naturalWidth") == 64
    shot(page, "history")
    say(page, "go on")
    assert len(server.backend.requests[-1].pictures) == 1
    page.get_by_role("button", name="Forget: another one").click()
    page.locator("#history .entry").nth(1).wait_for(state="detached")
    page.click("#clear-history")
    page.get_by_role("button", name="Forget all of it").click()
    page.wait_for_selector("#history-empty")
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    assert page.is_visible("#history-empty")
