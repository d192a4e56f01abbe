"""Videos in the page: a strip of frames with their times, and the question about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.media.films import film
from tests.server.conftest import Running
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import go, shot

TIMES = [f"{at * 0.4:.1f} s" for at in range(8)]
# How much of the upper half of each frame is black: a bar that grows with the time.
BARS = """() => [...document.querySelectorAll("#pictures .frame-at img")].map((image) => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const drawn = canvas.getContext("2d");
  drawn.drawImage(image, 0, 0);
  const row = drawn.getImageData(0, canvas.height / 4, canvas.width, 1).data;
  return row.filter((value, place) => place % 4 === 0 && value < 128).length;
})"""


def test_a_video_is_shown_as_a_strip_and_asked_about(page: Any, serve: Any, tmp_path: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"))
    go(page, server.url)
    page.set_input_files("#files", str(film(tmp_path / "clip.webm", frames=32)))
    page.wait_for_selector("#pictures .frame-at:nth-of-type(8)", state="attached")
    assert page.locator("#pictures .frame-at .how").all_inner_texts() == TIMES
    page.wait_for_function("[...document.querySelectorAll('#pictures .frame-at img')].every((one) => one.complete)")
    bars = page.evaluate(BARS)
    assert bars == sorted(set(bars)), bars
    assert page.inner_text("#pictures .count") == "3.2 s"
    page.fill("#question", "When does it open?")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    assert page.locator(".turn.user .frame-at .how").all_inner_texts() == TIMES
    (request,) = server.backend.requests
    texts = [part.text for part in request.messages[-1].parts if hasattr(part, "text")]
    assert texts[:2] == ["<0.0 seconds>", "<0.6 seconds>"]
    shot(page, "video")
    # What the history keeps has its frames.
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    page.click("#history .entry")
    page.wait_for_selector(".turn.user .frame-at", state="attached")
    assert page.locator(".turn.user .frame-at .how").all_inner_texts() == TIMES


def test_a_video_that_the_browser_does_not_play_is_sent_all_the_same(page: Any, serve: Any, tmp_path: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"))
    go(page, server.url)
    page.set_input_files("#files", str(film(tmp_path / "clip.avi")))
    page.get_by_text("clip.avi: the browser does not play it").wait_for()
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    assert len(server.backend.requests[0].pictures) == 4
    page.click("#tab-analyze")
    page.click("#analyze")
    page.wait_for_selector("#answer .facts dd")
    assert len(server.backend.requests[1].pictures) == 4
