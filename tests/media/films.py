"""Short films, drawn by qvl.tiny.render and encoded by PyAV when a test runs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
from PIL import Image, ImageDraw

from qvl.tiny.render import DrawnProduct, draw

# Container by ending, and a codec that it may hold.
FORMS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video", "mov": "mpeg4"}


@lru_cache(maxsize=256)
def still(number: int, of: int, size: tuple[int, int]) -> Image.Image:
    """Frame `number`: a drawn product, and a bar over the upper half that is (number + 1) / of wide."""
    image = draw(DrawnProduct("NORVIK", "mug", "blue", 1), 3, size).copy()
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, size[0], size[1] // 2), fill="white")
    pen.rectangle((0, 0, max(0, size[0] * (number + 1) // of - 1), size[1] // 2), fill="black")
    return image


def film(
    path: Path,
    *,
    frames: int = 20,
    fps: int = 10,
    size: tuple[int, int] = (128, 96),
    gaps: Sequence[int] = (),
    sound: bool = False,
) -> Path:
    """Write a film of `frames` frames; `gaps` are the ticks of a hundredth second between them for a variable rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(FORMS[path.suffix[1:]], rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 6
        if gaps:
            stream.codec_context.time_base = Fraction(1, 100)
        at = 0
        for number in range(frames):
            frame = av.VideoFrame.from_image(still(number, frames, size))
            if gaps:
                frame.pts, frame.time_base = at, Fraction(1, 100)
                at += gaps[number % len(gaps)]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound_alone(path: Path) -> Path:
    """Write a file with a stream of sound and none of pictures."""
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for start in range(0, 16_000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def without_frames(path: Path) -> Path:
    """Write a file with a stream of pictures that has none."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return path


def turned(data: bytes, quarters: int) -> bytes:
    """Return an MP4 whose pictures a player turns clockwise, by a matrix such as phones write."""
    rows = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 0x40000000)
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    plain = matrix(*rows[0])
    at = data.index(plain, data.index(b"tkhd"))
    return data[:at] + matrix(*rows[quarters]) + data[at + len(plain) :]


def bar(image: Image.Image) -> int:
    """Return how wide the bar of a frame is, in pixels."""
    row = image.convert("L").crop((0, image.height // 4, image.width, image.height // 4 + 1))
    return sum(value < 128 for value in row.tobytes())
