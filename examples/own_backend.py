"""A backend of your own: what it can do, and `stream`. `plugin_backend` is one that can be installed."""

import asyncio
from collections.abc import AsyncGenerator

from qvl import Backend, Capabilities, ChatRequest, Chunk, Usage
from qvl.errors import BackendUnavailableError


class ParrotBackend(Backend):
    name, model = "parrot", "words"
    # All else is refused by name, before `stream` answers a word.
    capabilities = Capabilities(sampling=frozenset({"max_tokens"}))

    def __init__(self) -> None:
        self.opened, self.running = False, 0

    async def open(self) -> None:
        self.opened = True

    async def aclose(self) -> None:
        self.opened = False

    def stats(self) -> dict[str, float]:
        return {"num_running": self.running}

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        words = request.messages[-1].text.split()
        answer = words[: request.sampling.max_tokens]
        self.running += 1
        try:
            for word in answer:
                await asyncio.sleep(0)
                if not self.opened:
                    raise BackendUnavailableError("the parrot is not open", hint="await backend.open()")
                yield Chunk(text=f"{word} ")
            usage = Usage(prompt_tokens=len(words) + 1, completion_tokens=len(answer))
            yield Chunk(finish_reason="stop" if answer == words else "length", usage=usage)
        finally:
            self.running -= 1
