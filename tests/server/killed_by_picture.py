"""`qvl-serve` as an engine that pictures of one size kill, before or after its first token.

python -m tests.server.killed_by_picture WIDTHxHEIGHT before|after ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from qvl.backends.local.backend import LocalBackend
from qvl.cli.serve import main
from qvl.types import ChatRequest, Chunk

whole = LocalBackend.stream


def deadly(size: str, when: str) -> None:
    """Lets the model's process end by SIGKILL, as a device's driver or the kernel ends one, at such a picture."""

    async def stream(self: LocalBackend, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        meets_it = any(f"{picture.width}x{picture.height}" == size for picture in request.pictures)
        if meets_it and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        async with aclosing(whole(self, request)) as chunks:
            async for chunk in chunks:
                yield chunk
                if meets_it:
                    os.kill(os.getpid(), signal.SIGKILL)

    LocalBackend.stream = stream  # type: ignore[method-assign]


if __name__ == "__main__":
    deadly(*sys.argv[1:3])
    main(sys.argv[3:])
