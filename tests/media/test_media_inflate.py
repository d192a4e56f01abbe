"""Compressed pictures are inflated a piece at a time, within every limit."""

from __future__ import annotations

import gzip

import anyio
import pytest

from qvl import media
from qvl.errors import MediaError
from qvl.media import content_encoding, fetch
from qvl.media.policy import MediaPolicy

HERE = MediaPolicy(allowed_private=("127.0.0.1",), timeout=10)


def test_what_inflates_is_counted_before_the_rest_of_it_is_made(site) -> None:
    counted: list[int] = []

    def count(size: int) -> None:
        counted.append(size)
        if sum(counted) > 500_000:
            raise MemoryError

    async def main() -> None:
        fetch.counter.set(count)
        with pytest.raises(MemoryError):
            await media.aload(site.url("/packed?bomb,gzip"), HERE)

    anyio.run(main)
    assert sum(counted) < 800_000


def test_a_packed_picture_of_many_empty_members_is_refused() -> None:
    with pytest.raises(MediaError, match="more than 1000 members"):
        content_encoding.unpacked(gzip.compress(b"") * 2_000, "gzip", HERE, "it")
