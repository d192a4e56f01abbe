"""An engine in a process of its own, which one picture kills: `python -m tests.backends.openai.dying_engine DIGEST`."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import sys
from dataclasses import dataclass

from tests.scripted_endpoint import Echo, ScriptedEndpoint, ScriptedExchange


@dataclass(frozen=True, slots=True)
class DyingEcho:
    """The echo, but SIGKILL for the process in the middle of an answer to the picture with this digest."""

    digest: str

    async def __call__(self, exchange: ScriptedExchange) -> None:
        for message in exchange.received.body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else []
            for part in parts:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    if hashlib.sha256(data).hexdigest() == self.digest:
                        os.kill(os.getpid(), signal.SIGKILL)
        await Echo(0.05)(exchange)


if __name__ == "__main__":
    with ScriptedEndpoint(default=DyingEcho(sys.argv[1])) as endpoint:
        print(endpoint.url, flush=True)
        signal.pause()
