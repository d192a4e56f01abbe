"""HTTP/1.1's framing: however the bytes are cut, and strict where the next answer depends on it."""

from __future__ import annotations

import gzip

import pytest

from qvl.http.connection import Connection
from qvl.http.framing import MAX_CHUNK, MAX_HEAD, Body, BrokenAnswerError

pytestmark = pytest.mark.anyio
CHUNKED = {"transfer-encoding": "chunked"}


def answer(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"", body])


async def read(data: bytes) -> tuple[bytes, Connection]:
    """What an answer says that comes in one piece, and the connection it came on."""
    connection = Connection()
    connection.data_received(data)
    _, status, headers = await connection.head()
    body, said = Body(status, headers), b""
    while (piece := await connection.next_piece(body)) is not None:
        said += piece[1]
    return said, connection


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_chunks_are_read_however_the_bytes_are_cut(step: int) -> None:
    wire = b"5\r\nhello\r\n6;x=1\r\n world\r\n0\r\nTrailer: a\r\n\r\n"
    body = Body(200, CHUNKED)

    got = b"".join(body.feed(wire[place : place + step]) for place in range(0, len(wire), step))

    assert got == b"hello world"
    assert body.done
    assert body.keeps


@pytest.mark.parametrize(
    "wire",
    [
        b"zz\r\nhello",
        b"-5\r\nhello",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"1_0\r\n0123456789abcdef\r\n",
        b" 5\r\nhello\r\n",
        b"\xd9\xa5\r\nhello\r\n",
        b"\r\nhello\r\n",
        b"fffffffff\r\n",
        b"5\r\nhello world\r\n",
    ],
)
def test_chunks_without_a_sane_size_are_no_answer(wire: bytes) -> None:
    with pytest.raises(BrokenAnswerError, match="chunk"):
        Body(200, CHUNKED).feed(wire)


def test_a_body_with_a_length_ends_there_and_one_without_ends_with_the_connection() -> None:
    body = Body(200, {"content-length": "3"})
    assert (body.feed(b"ab"), body.done, body.feed(b"cde"), body.done) == (b"ab", False, b"c", True)
    assert not Body(200, {}).keeps
    assert not Body(200, {"content-length": "3", "connection": "close"}).keeps


@pytest.mark.parametrize("length", ["-1", "5, 5", "\xb2", "9" * 5000])
def test_a_length_that_is_none_is_no_answer(length: str) -> None:
    with pytest.raises(BrokenAnswerError):
        Body(200, {"content-length": length})


def test_a_connection_on_which_more_came_than_was_asked_for_is_not_used_again() -> None:
    for headers, wire in ((CHUNKED, b"1\r\na\r\n0\r\n\r\nHTTP/1.1"), ({"content-length": "1"}, b"aHTTP/1.1")):
        body = Body(200, headers)
        assert (body.feed(wire), body.done, body.keeps) == (b"a", True, False)


@pytest.mark.parametrize("size", [b"5", b"5  ", b"05", b"5;x=1", b"5 ; x"])
def test_sizes_that_servers_pad_are_read(size: bytes) -> None:
    assert Body(200, CHUNKED).feed(size + b"\r\nhello\r\n") == b"hello"


@pytest.mark.parametrize("wire", [b"5;" + b"x" * 2 * MAX_HEAD, b"5" + b" " * 2 * MAX_HEAD])
@pytest.mark.parametrize("step", [1000, MAX_HEAD * 3])
def test_a_size_has_a_bound_whatever_follows_it(wire: bytes, step: int) -> None:
    body = Body(200, CHUNKED)
    pieces = [wire[start : start + step] for start in range(0, len(wire), step)]
    with pytest.raises(BrokenAnswerError, match="chunk"):
        list(map(body.feed, pieces))


async def test_a_head_has_a_bound() -> None:
    connection = Connection()
    connection.data_received(b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD)
    with pytest.raises(BrokenAnswerError, match="head"):
        await connection.head()


@pytest.mark.parametrize("step", [1000, MAX_HEAD * 2])
def test_trailers_have_a_bound(step: int) -> None:
    body = Body(200, CHUNKED)
    wire = b"1\r\na\r\n0\r\n" + b"X: y\r\n" * MAX_HEAD
    pieces = [wire[place : place + step] for place in range(0, len(wire), step)]
    with pytest.raises(BrokenAnswerError, match="trailers"):
        list(map(body.feed, pieces))


def test_a_large_chunk_is_put_together_once() -> None:
    data = b"x" * 2_000_000
    wire = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    body = Body(200, CHUNKED)
    got = b"".join(body.feed(wire[place : place + 1000]) for place in range(0, len(wire), 1000))
    assert (got, body.done) == (data, True)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_compressed_bodies_are_read_however_the_bytes_are_cut(step: int) -> None:
    wire = gzip.compress(b"hello ") + gzip.compress(b"world")
    body = Body(200, {"content-length": f"{len(wire)}", "content-encoding": "gzip"})
    got = b"".join(body.feed(wire[place : place + step]) for place in range(0, len(wire), step))
    assert (got, body.done, body.keeps) == (b"hello world", True, True)


def test_what_inflates_without_end_is_no_answer() -> None:
    wire = gzip.compress(bytes(4 * MAX_CHUNK))
    body = Body(200, {"content-length": f"{len(wire)}", "content-encoding": "gzip"})
    with pytest.raises(BrokenAnswerError, match="inflates"):
        body.feed(wire)


async def test_two_lengths_are_one_only_when_they_agree() -> None:
    assert (await read(answer(b"Content-Length: 2", b"content-length: 2", body=b"{}")))[0] == b"{}"
    with pytest.raises(BrokenAnswerError, match="two Content-Lengths"):
        await read(answer(b"Content-Length: 2", b"Content-Length: 3", body=b"{}\n"))


async def test_a_length_beside_chunks_is_passed_over_and_the_connection_ends() -> None:
    said, connection = await read(
        answer(b"Content-Length: 2", b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")
    )
    assert (said, connection.reusable) == (b"hello", False)


@pytest.mark.parametrize("more", [b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked"])
async def test_framing_within_framing_is_no_answer(more: bytes) -> None:
    with pytest.raises(BrokenAnswerError, match="unsupported Transfer-Encoding"):
        await read(answer(more, b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"))


async def test_one_of_two_connection_headers_closes_it() -> None:
    _, connection = await read(answer(b"Connection: close", b"Connection: x", b"Content-Length: 2", body=b"{}"))
    assert not connection.reusable


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\n", False),
    ],
)
async def test_a_connection_is_kept_only_where_the_next_answer_can_be_told(data: bytes, kept: bool) -> None:
    _, connection = await read(data)
    assert connection.reusable is kept


@pytest.mark.parametrize("status", [b"\xb2\xb2\xb2", b"2x0", b""])
async def test_a_status_that_is_no_number_is_no_answer(status: bytes) -> None:
    connection = Connection()
    connection.data_received(b"HTTP/1.1 " + status + b"\r\n\r\n")
    with pytest.raises(BrokenAnswerError):
        await connection.head()
