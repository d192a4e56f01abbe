"""One packet for what is written in one turn of the loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qvl.server.run_uvicorn import CorkedTransport


class Wire(asyncio.Transport):
    """Notes what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def write(self, data: Any) -> None:
        self.done.append(data)

    def is_reading(self) -> bool:
        return True

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")


@pytest.mark.parametrize(
    ("end", "done"), [("close", [b"headbody", "close"]), ("abort", ["abort"]), ("is_reading", [b"headbody"])]
)
def test_what_is_corked_leaves_before_a_close_and_never_after_an_abort(end: str, done: list[Any]) -> None:
    async def main() -> None:
        wire = Wire()
        corked = CorkedTransport(wire, asyncio.get_running_loop())
        corked.write(b"head")
        corked.write(b"body")
        getattr(corked, end)()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert wire.done == done

    asyncio.run(main())
