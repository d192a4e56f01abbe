"""Comparison of httptools (llhttp) with qvl's own HTTP framing, on the same bytes.

    pip install httptools
    python benchmarks/bench_framing.py

A head of eight headers and 100 chunks of one event each, as a chat completion streams them: in one block, and a block a
chunk, as they come off a socket. Then the cases in which the two decide differently.
"""

from __future__ import annotations

import gc
import statistics
import timeit
from collections.abc import Callable, Sequence
from functools import partial

import httptools

from qvl.http.framing import Body, BrokenAnswerError, read_head

EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
)
HEAD = b"\r\n".join(
    [
        b"HTTP/1.1 200 OK",
        b"date: Sun, 29 Nov 2026 08:00:00 GMT",
        b"server: uvicorn",
        b"content-type: text/event-stream; charset=utf-8",
        b"cache-control: no-cache",
        b"x-request-id: 0123456789abcdef",
        b"x-accel-buffering: no",
        b"connection: keep-alive",
        b"transfer-encoding: chunked",
        b"",
        b"",
    ]
)
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
START = b"HTTP/1.1 200 OK\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
CASES = {
    "a chunk that says it has 64 GiB": CHUNKED + b"fffffffff\r\n",
    "1 MB of chunk extension": CHUNKED + b"5;" + b"x" * 1_000_000,
    "an empty line behind the end": START + b"Content-Length: 2\r\n\r\n{}\r\n",
    "two equal lengths": START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a length beside chunks": START + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a size padded with spaces": CHUNKED + b"2  \r\n{}\r\n0\r\n\r\n",
}


def by_qvl(blocks: Sequence[bytes]) -> tuple[bytes, bool]:
    """The body, and whether the connection may be used again."""
    head, _, rest = blocks[0].partition(b"\r\n\r\n")
    body = Body(*read_head(head))
    payload = [body.feed(rest), *map(body.feed, blocks[1:])]
    return b"".join(payload), body.done and body.keeps


class Events:
    """What qvl needs of llhttp's callbacks: headers in lower case, whole chunks."""

    parser: httptools.HttpResponseParser

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.chunks: list[bytes] = []
        self.done = self.more = self.keeps = False

    def on_message_begin(self) -> None:
        self.more = self.done

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_chunk_complete(self) -> None:
        self.chunks.append(b"".join(self.parts))
        self.parts.clear()

    def on_headers_complete(self) -> None:
        self.keeps = self.parser.should_keep_alive()

    def on_message_complete(self) -> None:
        self.done = True


def by_httptools(blocks: Sequence[bytes]) -> tuple[bytes, bool]:
    events = Events()
    events.parser = parser = httptools.HttpResponseParser(events)
    for block in blocks:
        parser.feed_data(block)
    return b"".join(events.chunks + events.parts), events.done and not events.more and events.keeps


def verdict(read: Callable[[Sequence[bytes]], tuple[bytes, bool]], wire: bytes) -> str:
    try:
        payload, kept = read((wire,))
    except (BrokenAnswerError, httptools.HttpParserError) as exc:
        return f"refused: {exc}"
    return f"{payload!r}, connection {'kept' if kept else 'not kept'}"


def main() -> None:
    separate = [HEAD, *[CHUNK] * 100, b"0\r\n\r\n"]
    for name, blocks in (("in one block", [b"".join(separate)]), ("a block a chunk", separate)):
        for read in (by_qvl, by_httptools):
            assert read(blocks) == (EVENT * 100, True)
            gc.collect()
            runs = [seconds / 200 for seconds in timeit.repeat(partial(read, blocks), number=200, repeat=25)]
            print(f"{name}, {read.__name__}: {min(runs) * 1e6:.0f} us, median {statistics.median(runs) * 1e6:.0f}")
    for name, wire in CASES.items():
        print(f"{name}\n  qvl: {verdict(by_qvl, wire)}\n  httptools: {verdict(by_httptools, wire)}")


if __name__ == "__main__":
    main()
