"""What a known answer costs nobody: the blocking Pipeline finds it without its loop, and pictures are not decoded."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qvl
from qvl import Pipeline
from qvl.backends.base import Backend
from qvl.caches.memory import MemoryCache
from qvl.caches.sqlite import SqliteCache
from qvl.errors import ConfigError, MediaError
from qvl.pipeline.cache_store import WORKERS
from qvl.types import ChatRequest, Result

from .conftest import TalkingBackend, answer_json, answering


class Known(TalkingBackend):
    """Can tell its identity before it is opened, as the shipped backends can."""

    def peek_identity(self) -> dict[str, Any]:
        return self.identity()

    def peek_capabilities(self) -> Any:
        return self.capabilities


def loops() -> int:
    return sum(thread.name == "qvl-loop" for thread in threading.enumerate())


@pytest.fixture
def encoded() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((60, 40), 90).convert("RGB").save(out, "PNG")
    return out.getvalue()


def test_a_hit_needs_neither_the_loop_nor_the_backend(encoded: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mug.png"
    path.write_bytes(encoded)
    backend = Known(reply=answering(answer_json()))
    with Pipeline(backend=backend, cache=str(tmp_path / "answers.db")) as pipe:
        first = pipe.ask(path, "q"), pipe.analyze(path)
    before = loops()
    later = Pipeline(backend=Known(), cache=str(tmp_path / "answers.db"))
    again = later.ask(path, "q"), later.analyze(path)
    assert loops() == before
    assert [again[0].text, again[1].brand] == [first[0].text, first[1].brand]
    assert again[0].cache == "hit"
    assert again[0].timing.total >= again[0].timing.media > 0
    later.close()


def test_a_miss_after_looking_here_is_asked_once(encoded: bytes) -> None:
    backend = Known()
    with Pipeline(backend=backend, cache="memory:") as pipe:
        states = [pipe.ask(encoded, "q").cache for _ in range(3)]
    assert states == ["miss", "hit", "hit"]
    assert len(backend.requests) == 1


def test_a_stream_of_bytes_is_read_once_though_the_backend_is_opened_in_between(encoded: bytes) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with Pipeline(backend=TalkingBackend(), cache="memory:") as pipe:
        pipe.close()
        assert pipe.ask(Pipe(encoded), "q").text == "1:q"


def test_plugins_hear_of_hits_on_the_event_loop(encoded: bytes) -> None:
    heard: list[tuple[str, str]] = []

    class Listening:
        @qvl.hookimpl
        def response_done(self, result: Result) -> None:
            heard.append((result.cache, threading.current_thread().name))

    with Pipeline(backend=Known(), cache="memory:", plugins=[Listening()]) as pipe:
        for _ in range(2):
            pipe.ask(encoded, "q")
    assert heard == [("miss", "qvl-loop"), ("hit", "qvl-loop")]


def test_threads_find_hits_side_by_side(encoded: bytes, tmp_path: Path) -> None:
    with SqliteCache(tmp_path / "answers.db") as cache, Pipeline(backend=Known(), cache=cache) as pipe:
        pipe.ask(encoded, "q")
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.extend(pipe.ask(encoded, "q").cache for _ in range(10)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["hit"] * 80


def test_an_error_names_the_picture_also_where_it_is_met_here(encoded: bytes) -> None:
    with Pipeline(backend=Known(), cache="memory:") as pipe:
        for source in (b"no picture", encoded[:-100]):
            with pytest.raises(MediaError) as caught:
                pipe.ask(source, "q")
            assert caught.value.picture == 0


class Passing(Known):
    """Hands bytes on, and notes for each picture whether they were at hand."""

    wants_pixels = False

    def __init__(self) -> None:
        super().__init__()
        self.at_hand: list[bool] = []
        self.sent: list[bytes] = []

    def stream(self, request: ChatRequest) -> Any:
        self.at_hand += [picture.at_hand for picture in request.pictures]
        self.sent += [picture.data for picture in request.pictures]
        return super().stream(request)


def _decoding_fails(*args: Any) -> Image.Image:
    raise AssertionError("decoded")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_a_hit_is_refused_as_a_miss_would_be(encoded: bytes, tmp_path: Path) -> None:
    with SqliteCache(tmp_path / "answers.db") as cache:
        with Pipeline(backend=Known(), cache=cache) as pipe:
            pipe.ask(encoded, "q")
        later = Pipeline(backend=Known(), cache=cache)
        assert later.ask(encoded, "q").cache == "hit"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                later.ask(encoded, "q")
            except ConfigError as exc:
                code = 0 if "fork" in str(exc) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        later.close()


@pytest.mark.parametrize("pictures", [1, 2])
def test_bytes_are_checked_and_not_decoded_for_a_backend_that_hands_them_on(
    encoded: bytes, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Passing()
    with Pipeline(backend=backend, cache="off") as pipe:
        monkeypatch.setattr("qvl.media.pixels.decode", _decoding_fails)
        pipe.ask([encoded] * pictures, "q")
        assert backend.at_hand == [True] * pictures
        assert backend.sent == [encoded] * pictures


@pytest.mark.parametrize("wants_pixels", [True, False])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_broken_picture_is_never_sent(encoded: bytes, pictures: int, wants_pixels: bool) -> None:
    backend: Backend = Passing()
    backend.wants_pixels = wants_pixels
    with Pipeline(backend=backend, cache="off") as pipe, pytest.raises(MediaError, match="cut short") as caught:
        pipe.ask([*[encoded] * (pictures - 1), encoded[:-100]], "q")
    assert caught.value.picture == pictures - 1
    assert not getattr(backend, "sent", None)


def test_a_picture_that_must_be_changed_is_sent_as_the_canonical_one(encoded: bytes) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(out, "PNG")
    backend = Passing()
    with Pipeline(backend=backend, cache="off") as pipe:
        pipe.ask(out.getvalue(), "q")
        pipe.ask(encoded, "q", max_pixels=1024)
    clear, small = (Image.open(io.BytesIO(data)) for data in backend.sent)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert small.width * small.height <= 1024


def test_a_failing_cache_is_a_miss_here_too(encoded: bytes) -> None:
    class Failing(MemoryCache):
        instant = False

        def get(self, key: str) -> Any:
            raise qvl.errors.CacheError("the disk is gone")

    with Pipeline(backend=Known(), cache=Failing()) as pipe:
        assert pipe.ask(encoded, "q").text == "1:q"
        assert pipe.stats()["cache_failures"] >= 1


def test_a_second_question_about_a_picture_neither_hashes_nor_checks_it(
    encoded: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Passing()
    with Pipeline(backend=backend, cache="memory:") as pipe:
        first = pipe.ask(encoded, "q")
        monkeypatch.setattr("qvl.media.digest_cache.Encoded", _decoding_fails)
        monkeypatch.setattr("qvl.media.pixels.check", _decoding_fails)
        second = pipe.ask(bytes(bytearray(encoded)), "another question")
        streamed = [chunk.text for chunk in pipe.stream(encoded, "a third one")]
    assert second.pictures == first.pictures
    assert "".join(streamed) == "1:a third one"
    assert backend.sent == [encoded] * 3


def test_no_more_threads_ask_a_store_at_once_than_it_has_connections_for(encoded: bytes) -> None:
    class Counting(MemoryCache):
        instant = False

        def __init__(self) -> None:
            super().__init__()
            self.inside = 0
            self.most = 0
            self.counting = threading.Lock()

        def get(self, key: str) -> Any:
            with self.counting:
                self.inside += 1
                self.most = max(self.most, self.inside)
            time.sleep(0.002)
            with self.counting:
                self.inside -= 1
            return super().get(key)

    cache = Counting()
    with Pipeline(backend=Known(), cache=cache) as pipe:
        pipe.ask(encoded, "q")
        threads = [threading.Thread(target=pipe.ask, args=(encoded, "q")) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 < cache.most <= WORKERS


INTERRUPTED = """
import random, signal, sys, threading
from qvl.caches.base import CacheEntry
from qvl.caches.memory import MemoryCache
from qvl.caches.sqlite import SqliteCache
from qvl.pipeline.cache_store import WORKERS, Store

def interrupt(*_):
    raise KeyboardInterrupt

cache = MemoryCache() if sys.argv[1] == "memory" else SqliteCache(sys.argv[1])
cache.set("k", CacheEntry(result={}, text="t"))
store = Store(cache)
signal.signal(signal.SIGALRM, interrupt)
for _ in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 3e-4))
        for _ in range(20):
            store.get("k")
    except KeyboardInterrupt:
        pass
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
found = []
other = threading.Thread(target=lambda: found.extend(store.get("k") for _ in range(WORKERS)), daemon=True)
other.start()
other.join(20)
print("LOCKED" if other.is_alive() else f"{len(found)} of {WORKERS}", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no interval timers")
@pytest.mark.parametrize("where", ["memory", "answers.db"])
def test_ctrl_c_in_the_midst_of_a_look_leaves_no_lock_behind(tmp_path: Path, where: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == f"{WORKERS} of {WORKERS}", done.stderr
