"""Every state of the page at three widths, light and dark: axe-core finds nothing, nothing needs sideways scrolling."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.types import ChatRequest, Chunk, Usage
from tests.media.films import film
from tests.media.papers import BAG, MUG, paper
from tests.server.conftest import Running, start
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import Line, drop, go, looked_at, watched

ANSWER = ".turn.assistant .answer"
PICTURES = Path(__file__).parents[3] / "examples" / "pictures"


@pytest.fixture(scope="module")
def bundled():
    running = start(LocalBackend())
    yield running
    running.stop()


def look_at_media(page: Any, bundled: Running, look: Callable[[str], None], folder: Path) -> None:
    """PDFs and videos: before they are sent, in a turn, drawn with boxes; and what is refused."""
    page.goto(bundled.url)
    page.wait_for_selector("#state.ready")
    (folder / "bill.pdf").write_bytes(paper([MUG, BAG]))
    page.set_input_files("#files", [str(folder / "bill.pdf"), str(film(folder / "clip.webm", frames=32))])
    page.locator("#pictures .frame-at").first.wait_for(state="attached")
    look("media")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    look("media-chat")
    page.click("#tab-locate")
    page.click("#locate")
    page.wait_for_selector("#locate:enabled")
    look("media-refused")
    page.get_by_label("Pages of bill.pdf").fill("1")
    page.click("#locate")
    page.wait_for_selector("#answer .place rect")
    look("media-locate")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_every_state_is_for_everybody(
    browser, axe: Path, bundled: Running, width: int, scheme: str, tmp_path: Path
) -> None:
    height = 844 if width < 800 else 1000
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.add_init_script(path=str(axe))
    page, faults = watched(context)
    look = looked_at(page, width, f"state-{width}-{scheme}", wrong := [])
    page.goto(bundled.url)
    page.wait_for_selector("#state.ready")
    look("empty")
    drop(page, "a-name-that-is-rather-long-norvik-mug-red.png", (PICTURES / "norvik-mug-red.png").read_bytes())
    page.locator("#pictures .count", has_text="tokens").wait_for()
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    drop(page, "shoe.webp", (PICTURES / "shoe.webp").read_bytes(), "image/webp")
    page.locator("#pictures .count", has_text="tokens").wait_for()
    look("chat")
    page.locator(".turn.user").get_by_role("button", name="Edit").click()
    look("edit")
    page.locator(".turn.user").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Copy as …").click()
    look("code")
    page.keyboard.press("Escape")
    page.locator(".turn .picture").click()
    look("picture")
    page.keyboard.press("Escape")
    page.click("#tab-analyze")
    page.check("#where")
    drop(page, "mug.png", (PICTURES / "norvik-mug-red.png").read_bytes())
    page.locator("#pictures .count", has_text="tokens").nth(1).wait_for()
    page.click("#analyze")
    page.wait_for_selector("#analyze:enabled")
    page.locator(".field.placed").first.focus()
    look("analyze")
    page.select_option("#schema-kind", "fields")
    look("fields")
    page.select_option("#schema-kind", "json")
    page.locator("#schema").press_sequentially(', {"t')
    look("schema")
    page.select_option("#schema-kind", "product")
    page.click("#tab-locate")
    page.click("#locate")
    page.wait_for_selector("#locate:enabled")
    look("locate")
    page.click("#tab-decide")
    page.get_by_label("Question 1", exact=True).fill("Is it red?")
    page.click("#decide")
    page.wait_for_selector("#decide:enabled")
    look("decide")
    page.click("#tab-compare")
    page.fill("#max_tokens-b", "1")
    page.click("#compare")
    page.wait_for_selector("#compare:enabled")
    look("compare")
    page.click("#tab-batch")
    page.set_input_files("#batch-folder", str(PICTURES))
    page.wait_for_selector("#batch-start:enabled")
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="12 of 12").wait_for(timeout=120_000)
    look("batch")
    page.click("#history-button")
    page.locator("#history .entry").first.wait_for()
    page.click("#settings-button")
    look("panels")
    look_at_media(page, bundled, look, tmp_path)
    page.goto(f"{bundled.url}/docs")
    page.click("summary")
    look("docs")
    context.close()
    assert not faults
    assert not wrong, "\n".join(map(str, wrong))


WIDE = "| " + " | ".join(f"a column {number}" for number in range(9)) + " |\n" + "|---" * 9 + "|\n" + "| 1 " * 9 + "|"
LONG = f"""# A heading

1. a list with `code`, **bold** and *light*
2. {"unbroken" * 20}

> a quotation

{WIDE}

```python
print({", ".join(f'"{number} of a long line"' for number in range(9))})
```

[a link](https://example.org/)"""


class Telling(EchoBackend):
    """Thinks, says `LONG`, and then, to a question of several words, those one after the other."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        if " " in request.messages[-1].text:
            async for chunk in super().stream(request):
                yield chunk
            return
        yield Chunk(reasoning="The plate says NORVIK. " * 12)
        yield Chunk(text=LONG)
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=8, reasoning_tokens=7))


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (820, "light"), (1440, "light")])
def test_what_answers_are_made_of_is_for_everybody(
    browser, axe: Path, serve, line: list[Line], width: int, scheme: str
) -> None:
    server: Running = serve(Telling(pause=0.1))
    line.append(Line(server.port))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.add_init_script(path=str(axe))
    page, faults = watched(context)
    look = looked_at(page, width, f"state-{width}-{scheme}", wrong := [])
    go(page, f"http://127.0.0.1:{line[0].port}")
    page.fill("#question", "hello")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    look("markdown")
    # A table of many columns is scrolled, and its words stay whole.
    widths = page.locator(".answer table").evaluate("table => [table.scrollWidth, table.parentElement.clientWidth]")
    assert width > 390 or widths[0] > widths[1]
    page.click(".thought summary")
    look("reasoning")
    page.fill("#question", "w " * 1500)
    page.click("#send")
    page.locator(ANSWER, has_text="w w").wait_for()
    look("answering")
    page.click("#stop")
    page.locator(".turn .facts", has_text="stopped").wait_for()
    look("stopped")
    page.fill("#question", "w " * 1500)
    page.click("#send")
    page.locator(ANSWER, has_text="w w").nth(1).wait_for()
    line[0].cut()
    page.locator(".turn .failed", has_text="The connection was lost").wait_for()
    look("lost")
    page.fill("#question", "more")
    page.click("#send")
    page.locator("#error", has_text="cannot be reached").wait_for()
    look("unreachable")
    context.close()
    assert not faults
    assert not wrong, "\n".join(map(str, wrong))
