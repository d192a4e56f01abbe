"""The live output of `qvl agent`: the chain of calls, the answer, every iteration, and the conversation."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.agent.about import about_agent, asks_about_agent
from qvl.cli import failure
from qvl.cli.conversation import converse
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError, write_failed

if TYPE_CHECKING:
    from qvl.agent.steps import Event, Recommendation
    from qvl.agent.trace import Trace
    from qvl.agent.workflow import Recommender
    from qvl.pipeline.async_pipeline import AsyncPipeline

_REMOTE: Final = ("http://", "https://", "data:")


class Presenter:
    """Runs the recommender and prints each run's steps and recommendation, and writes them to `html` if set."""

    def __init__(self, recommender: Recommender, as_json: bool, html: Path | None) -> None:
        self.recommender = recommender
        self.as_json = as_json
        self.html = html

    async def run(self, picture: str | None, wish: str, thread: str | None) -> tuple[Recommendation, float]:
        """Return the recommendation and the seconds it took; after a failed step it has the earlier steps' results."""
        from rich.live import Live

        from qvl.agent.steps import StepError
        from qvl.agent.trace import Trace
        from qvl.cli.console import stdout

        trace = Trace(wish, picture or "")
        console = stdout()
        # Without a terminal there is nothing to draw anew: the tree is printed once, at the end.
        live = None
        if console.is_terminal and not self.as_json:
            live = Live(get_renderable=trace.tree, console=console, refresh_per_second=8)
        began = time.perf_counter()

        def on_event(event: Event) -> None:
            trace.add(event)
            if self.as_json:
                print_json({"event": event.to_json()})

        error: StepError | None = None
        with live if live is not None else nullcontext():
            try:
                answer = await self.recommender.arecommend(picture, wish, thread=thread, on_event=on_event)
            except StepError as exc:
                error, answer = exc, exc.recommendation
        seconds = time.perf_counter() - began
        if live is None and not self.as_json:
            console.print(trace.tree())
        # On a terminal the tree has it already, where it happened.
        if error is not None and not (live is not None and sys.stderr.isatty()):
            failure.report(error)
        self._end(answer, seconds)
        if self.html is not None:
            self._write_page(self.html, trace, answer, picture)
        return answer, seconds

    def _write_page(self, path: Path, trace: Trace, answer: Recommendation, picture: str | None) -> None:
        from qvl.agent.page import page

        try:
            path.write_text(page(trace, answer, picture), encoding="utf-8", errors="backslashreplace")
        except OSError as exc:
            raise write_failed(f"--html {path}", exc) from exc

    def _end(self, answer: Recommendation, seconds: float) -> None:
        from rich.text import Text

        from qvl.agent.trace import plain
        from qvl.cli.console import stdout

        if self.as_json:
            print_json({"recommendation": answer.to_json(), "seconds": round(seconds, 6)})
            return
        console = stdout()
        if answer.failed and answer.analysis:
            console.print(Text(f"kept: {plain(answer.analysis)}"))
        if answer.text:
            console.print()
            console.print(Text(answer.text))
        for note in answer.notes:
            console.print(Text(f"note: {note}", style="yellow"))


def session(
    pipeline: AsyncPipeline,
    presenter: Presenter,
    picture: str | None,
    wish: str,
    thread: str | None,
    iterations: int,
    chat: bool,
) -> bool:
    """Run every iteration, then the conversation; return True if no step failed."""
    with asyncio.Runner() as runner:
        try:
            times: list[float] = []
            ok = True
            if picture is not None or not chat:
                for number in range(1, iterations + 1):
                    answer, seconds = runner.run(presenter.run(picture, wish, thread))
                    thread = answer.thread if chat or thread else None
                    ok = ok and not answer.failed
                    times.append(seconds)
                    if iterations > 1 and not presenter.as_json:
                        print(_counted(number, times, answer), end="\n" if number == iterations else "\n\n")
            if chat:
                _talk(runner, presenter, thread or uuid.uuid4().hex)
            return ok
        finally:
            runner.run(pipeline.aclose())


def _counted(number: int, times: list[float], answer: Recommendation) -> str:
    count = answer.inferences
    text = f"run {number}: {times[-1] * 1000:.1f} ms, {count or 'no'} inference{'s' if count > 1 else ''}"
    return text if number == 1 else f"{text}, {times[0] / times[-1]:.0f} x faster than the first"


def _talk(runner: asyncio.Runner, presenter: Presenter, thread: str) -> None:
    """Answer lines from stdin: wishes, pictures, both in one line, and what the agent can do."""
    recommender = presenter.recommender

    async def answer(pictures: list[str], text: str) -> None:
        if not pictures and asks_about_agent(text):
            told = about_agent(recommender.catalog, recommender.writes)
            if presenter.as_json:
                print_json({"about": told})
            else:
                print(f"{told}\n")
            return
        if len(pictures) > 1:
            raise ConfigError(f"{len(pictures)} pictures in one line", hint="show one product at a time")
        for picture in pictures:
            check_picture(picture)
        if not pictures and not recommender.has_picture(thread):
            raise ConfigError("no picture yet", hint="name its path or URL; `what can you do?` tells more")
        await presenter.run(pictures[0] if pictures else None, text, thread)
        if not presenter.as_json:
            print()

    converse(runner, "wish, picture, or quit> ", answer)


def check_picture(text: str) -> None:
    """Check that a file exists and is a picture or a video before anything starts; URLs are not checked.

    Raises:
        MediaError: the file does not exist, or is neither.
    """
    if text.startswith(_REMOTE):
        return
    from qvl.media import gate
    from qvl.media.load_video import load_video
    from qvl.media.video_head import looks_like_video

    if looks_like_video(text):
        load_video(text)
    else:
        gate.load(text)
