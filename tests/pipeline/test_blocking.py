"""The blocking Pipeline's own promises: what happens to its loop when nobody closes it, forks, or presses Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal
from PIL import Image

from qvl import Pipeline
from qvl.errors import ConfigError
from qvl.types import ChatRequest, Chunk

from .conftest import TalkingBackend


class Interrupted(TalkingBackend):
    """Presses Ctrl-C as soon as it is asked, and then never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        try:
            yield Chunk(text="one")
            signal.raise_signal(signal.SIGINT) if sys.platform == "win32" else os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            self.ended.set()


class Waiting(TalkingBackend):
    """Begins, and never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.ended = threading.Event(), threading.Event()
        self.begun.set()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        try:
            self.begun.set()
            await asyncio.sleep(60)
            yield Chunk(text="one")
        finally:
            self.ended.set()


@pytest.mark.parametrize("streaming", [False, True])
def test_ctrl_c_ends_the_work_and_stays_ctrl_c(picture: Image.Image, streaming: bool) -> None:
    backend = Interrupted()
    with Pipeline(backend=backend, cache="off") as pipe:
        with pytest.raises(KeyboardInterrupt):
            list(pipe.stream(picture, "q")) if streaming else pipe.ask(picture, "q")
        assert backend.ended.wait(30)


def test_ctrl_c_before_the_call_has_its_future_ends_the_work_too(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Waiting()
    start = BlockingPortal.start_task_soon

    def interrupted(portal: BlockingPortal, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        asking = getattr(work, "__name__", "") == "run" and not backend.begun.is_set()
        future = start(portal, work, *args, **options)
        if asking:
            assert backend.begun.wait(30)
            raise KeyboardInterrupt
        return future

    monkeypatch.setattr(BlockingPortal, "start_task_soon", interrupted)
    with Pipeline(backend=backend, cache="off") as pipe:
        monkeypatch.setattr(backend, "begun", threading.Event())
        with pytest.raises(KeyboardInterrupt):
            pipe.ask(picture, "q")
        assert backend.ended.wait(30)


def test_a_pipeline_that_nobody_holds_any_more_is_closed(picture: Image.Image) -> None:
    backend = TalkingBackend()
    pipe = Pipeline(backend=backend, cache="off")
    pipe.ask(picture, "q")
    before = [thread for thread in threading.enumerate() if thread.name == "qvl-loop"]
    del pipe
    gc.collect()
    assert backend.closed == 1
    assert not any(thread.is_alive() for thread in before)


def test_a_stream_left_open_is_no_noise_when_the_pipeline_closes(picture: Image.Image) -> None:
    pipe = Pipeline(backend=TalkingBackend(), cache="off")
    stream = pipe.stream(picture, "many words to come")
    next(stream)
    pipe.close()
    stream.close()


def test_a_program_that_closes_nothing_ends_without_a_word(tmp_path: Path) -> None:
    program = (
        "from PIL import Image; from qvl import Pipeline; from qvl.testing.recording import EchoBackend\n"
        "pipe = Pipeline(backend=EchoBackend(), cache='memory:')\n"
        "stream = pipe.stream(Image.new('RGB', (40, 40)), 'many words to come')\n"
        "print(next(stream).text)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_it_says_so_instead_of_waiting_for_ever(picture: Image.Image) -> None:
    with Pipeline(backend=TalkingBackend(), cache="off") as pipe:
        pipe.ask(picture, "q")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                pipe.ask(picture, "q")
            except ConfigError as exc:
                code = 0 if "fork" in str(exc) else 2
                pipe.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pipe.ask(picture, "q").text == "1:q"


def test_it_says_what_it_is_made_of_and_every_method_what_it_does() -> None:
    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe:
        assert repr(pipe) == f"<Pipeline {pipe.pipeline.backend.name}:{pipe.pipeline.backend.model} cache=memory:>"
    methods = [name for name in dir(Pipeline) if not name.startswith("_")]
    assert [name for name in methods if not getattr(Pipeline, name).__doc__] == []
