"""A pipeline that remembers how long it took to open, since that is most of the first answer's time."""

from __future__ import annotations

import time

from qvl.pipeline import AsyncPipeline


class TimedPipeline(AsyncPipeline):
    """`opening` is the time in seconds that weights or connections took; 0 while nothing needed them."""

    opening = 0.0

    async def open(self) -> None:
        began = time.perf_counter()
        await super().open()
        # Those who come later wait for a shorter while, or not at all.
        self.opening = max(self.opening, time.perf_counter() - began)
