"""The backend: counts the colours of each picture and says them, most frequent first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from qvl import Backend, Capabilities, ChatRequest, Chunk, Picture, Usage
from qvl.errors import BackendUnavailableError, ConfigError

NAMES = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 50),
}


class PaletteBackend(Backend):
    """Answers `palette:N`, where N is how many colours of a picture are told apart.

    Args:
        model: N, from 2 to 256; empty is 8.
    """

    name = "palette"

    def __init__(self, model: str = "") -> None:
        self.model = model or "8"
        if not self.model.isdigit() or not 2 <= int(self.model) <= 256:
            raise ConfigError(f"palette:{model} is no number of colours", hint="2 to 256, such as palette:16")
        self._open = False
        self._running = 0

    @property
    def capabilities(self) -> Capabilities:
        # What is not named here is refused before `stream` is asked: the honest way to leave something out.
        return Capabilities(images=16, sampling=frozenset({"max_tokens", "temperature"}))

    async def open(self) -> None:
        self._open = True

    async def aclose(self) -> None:
        self._open = False

    def identity(self) -> dict[str, Any]:
        # All that changes an answer; a new version of the algorithm must not be answered from an old cache.
        return {"backend": self.name, "model": self.model, "version": 1}

    def peek_identity(self) -> dict[str, Any]:
        return self.identity()

    def stats(self) -> Mapping[str, float]:
        return {"num_running": self._running}

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        if not self._open:
            raise BackendUnavailableError("palette is not open", hint="await backend.open()")
        self._running += 1
        try:
            words: list[str] = []
            for number, picture in enumerate(request.pictures, start=1):
                # Counting is work for the processor: off the event loop, so that other streams go on.
                colours = await asyncio.to_thread(colours_of, picture, int(self.model))
                words += [f"picture {number}:", *colours]
            words += ["asked:", *request.messages[-1].text.split()]
            limit = request.sampling.max_tokens or len(words)
            for place, word in enumerate(words[:limit]):
                await asyncio.sleep(0)
                if not self._open:
                    raise BackendUnavailableError("palette was closed")
                yield Chunk(text=word if place == 0 else f" {word}")
            yield Chunk(
                finish_reason="length" if limit < len(words) else "stop",
                usage=Usage(
                    prompt_tokens=sum(len(m.text.split()) for m in request.messages) + 64 * len(request.pictures) + 1,
                    completion_tokens=min(limit, len(words)),
                    image_tokens=64 * len(request.pictures),
                ),
            )
        finally:
            self._running -= 1


def colours_of(picture: Picture, count: int) -> list[str]:
    """Names of the most frequent colours, most frequent first, each once."""
    image = picture.rgb().resize((64, 64)).quantize(count)
    palette = image.getpalette() or []
    found: list[str] = []
    for _, index in sorted(image.getcolors() or [], reverse=True):
        rgb = palette[3 * index : 3 * index + 3]
        name = min(NAMES, key=lambda name: sum((a - b) ** 2 for a, b in zip(NAMES[name], rgb, strict=True)))
        if name not in found:
            found.append(name)
    return found
