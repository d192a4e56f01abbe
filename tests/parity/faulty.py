"""A command of qvl with a fault: `python -m tests.parity.faulty exif,alpha,prefix,sampling qvl.cli.serve …`."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from PIL import Image

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.scheduling.prefix_cache import BlockHashes
from qvl.media import image_header, pixels
from qvl.types import ChatRequest, Chunk


def on_black(image: Image.Image) -> Image.Image:
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "black"), whole).convert("RGB")


def sample_always() -> None:
    """Samples whatever it is asked for, as a server does that applies the checkpoint's generation_config."""
    greedy = LocalBackend.stream

    async def stream(self: LocalBackend, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        sampling = dataclasses.replace(request.sampling, temperature=2.0)
        async with aclosing(greedy(self, request.replace(sampling=sampling))) as chunks:
            async for chunk in chunks:
                yield chunk

    LocalBackend.stream = stream


def forget_pictures() -> None:
    """Takes the prefix of another picture for this one's, as a cache does whose keys have no picture in them."""
    made = BlockHashes.__init__

    def init(self: BlockHashes, pictures: object, salt: str = "") -> None:
        made(self, (), salt)

    BlockHashes.__init__ = init


def plant(faults: str) -> None:
    if "exif" in faults:
        image_header.exif_orientation = pixels.exif_orientation = lambda block: 1
        pixels._image_orientation = lambda image: 1
    if "alpha" in faults:
        pixels._on_white = on_black
    if "prefix" in faults:
        forget_pictures()
    if "sampling" in faults:
        sample_always()


if __name__ == "__main__":
    plant(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
