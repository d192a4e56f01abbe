"""`qvl chat`: a conversation with pictures at any turn."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from qvl._printable import plain
from qvl.cli import options
from qvl.cli.expand import Without, expand
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.media.video import Medium
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.parse_request import RequestParams
    from qvl.types import JsonObject

_LEFT_OUT: Final = ("calibration", "abstain", "video", "pages")


@expand
def chat(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Shown with the first question: files, globs, URLs.")
    ] = None,
    *,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    settings: Annotated[options.PipelineOptions, Without(*_LEFT_OUT)],
    verbose: options.Verbose = False,
) -> None:
    """Talk with the model: one question a line, with pictures by path or URL at any turn. /help lists the commands.

    Ctrl-C stops an answer. Lines may come from a pipe too. Exit code: 0 done, 1 some line of a pipe failed, 2 wrong
    use.
    """
    from qvl.cli import conversation, parse_args
    from qvl.cli.failure import FAILED, stderr

    options.start_logs(verbose)
    if "-" in (pictures or ()):
        raise ConfigError("stdin has the questions, so no picture can come from there", hint="name a file or a URL")
    named = [cast("str", item.source) for item in parse_args.pictures(pictures or ())]
    request = settings.request()
    if request.get("n", 1) != 1:
        raise ConfigError("a conversation goes on with one answer", hint="omit -p n=…")
    pipeline = settings.build()
    talk = Talk(pipeline, system, request)
    commands = {
        "system": ("TEXT sets the system prompt; alone, it shows it", talk.set_system),
        "clear": ("forget the conversation, but not the system prompt", talk.clear),
    }
    typed = sys.stdin.isatty()
    with asyncio.Runner() as runner:
        try:
            if named:
                runner.run(talk.show(named))
            if typed:
                about = f"{pipeline.backend.name}:{pipeline.backend.model}"
                stderr().print(f"{about} · {conversation.SHOWN} · /help", style="dim")
            answered = conversation.converse(runner, "> ", talk.answer, commands)
        finally:
            runner.run(pipeline.aclose())
    if not (answered or typed):
        raise typer.Exit(FAILED)


class Talk:
    """A conversation: asks with all turns so far, and prints the answer as it is written.

    Args:
        pipeline: what answers.
        system: the system prompt; None for none.
        request: parameters of every request.
    """

    def __init__(self, pipeline: AsyncPipeline, system: str | None, request: JsonObject) -> None:
        self.pipeline = pipeline
        self.system = system
        self.request = request
        self.turns: list[JsonObject] = []
        self.waiting: list[Medium] = []

    def set_system(self, text: str) -> None:
        """Set the system prompt to `text`; without a text, print it."""
        self.system = text or self.system
        print(f"system prompt: {plain(self.system or '(none)')}")

    def clear(self, _: str) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.waiting.clear()
        print("a new conversation")

    async def show(self, pictures: Sequence[str]) -> None:
        """Read pictures, once, for the next question.

        Raises:
            MediaError: one cannot be read; none is kept.
        """
        from qvl.pipeline.load_pictures import load_pictures
        from qvl.pipeline.parse_parts import UnreadPicture

        executor = self.pipeline.executor
        unread = [UnreadPicture(picture) for picture in pictures]
        self.waiting += await load_pictures(unread, executor.media, digests=executor.digests)

    async def answer(self, pictures: Sequence[str], text: str) -> None:
        """Print the answer to a line; a line of pictures alone waits for its question.

        What failed is forgotten; of an answer that was stopped, what was written is kept.
        """
        from qvl.cli.failure import stderr
        from qvl.pipeline.parse_parts import UnreadPicture
        from qvl.pipeline.parse_request import question_messages

        await self.show(pictures)
        if not text:
            count = len(self.waiting)
            print(f"{count} picture{'s' * (count > 1)} read; ask about {'them' if count > 1 else 'it'}")
            return
        shown = [UnreadPicture(medium) for medium in self.waiting]
        question = question_messages(shown, text, None)
        system = [{"role": "system", "content": self.system}] if self.system else []
        written: list[str] = []
        cut_off = False
        params = cast("RequestParams", self.request)
        stream = self.pipeline.stream_chat([*system, *self.turns, *question], **params)
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    if chunk.reasoning and sys.stderr.isatty():
                        stderr().print(chunk.reasoning, style="dim", end="")
                    if chunk.text:
                        written.append(chunk.text)
                        sys.stdout.write(plain(chunk.text))
                        sys.stdout.flush()
                    cut_off = chunk.finish_reason == "length" or cut_off
            self._keep(question, written)
        except asyncio.CancelledError:
            if written:
                self._keep(question, written)
            raise
        finally:
            if written:
                sys.stdout.write("\n")
                sys.stdout.flush()
        if cut_off or not written:
            stderr().print("(cut off: --max-tokens)" if cut_off else "(an empty answer)", style="yellow")

    def _keep(self, question: Sequence[JsonObject], written: Sequence[str]) -> None:
        self.turns += [*question, {"role": "assistant", "content": "".join(written)}]
        self.waiting.clear()
