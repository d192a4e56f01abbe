"""Effect of hostile pictures on other requests: each is loaded twice concurrently, beside a loop that keeps loading a
small picture.

    python benchmarks/bench_hostile_pictures.py [NAME ...]

A line for each file: its size, the longest wait for the small picture, the time until both were answered, and how much
the highest memory of the process grew. Each runs in a process of its own, which is ended after a minute.
"""

from __future__ import annotations

import asyncio
import io
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from PIL import Image

LIMIT = 60


def encoded(form: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def scans(number: int) -> bytes:
    data = encoded("JPEG", (4000, 3000), progressive=True)
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * number + b"\xff\xd9"


def jpeg_with(extra: bytes) -> bytes:
    return b"\xff\xd8" + extra + encoded("JPEG", (64, 64))[2:]


def png_with(extra: bytes) -> bytes:
    data = encoded("PNG", (64, 64))
    return data[:33] + extra + data[33:]


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def strips(number: int) -> bytes:
    tags = ((256, 1), (257, number), (258, 8), (259, 1), (262, 1), (273, 0), (278, 1), (279, 0))
    body = b"".join(
        struct.pack("<HHII", tag, 4, number if tag in (273, 279) else 1, 200 if tag in (273, 279) else value)
        for tag, value in tags
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)
    return head.ljust(200, b"\0") + struct.pack("<I", 1) * number


def gif_with(blocks: int = 0, comment: int = 0) -> bytes:
    data = encoded("GIF", (64, 64), "P")
    start = data.index(b"\x2c", 13)
    comments = b"\x21\xfe" + (b"\xff" + bytes(255)) * comment + b"\0" if comment else b""
    return data[:start] + comments + data[start : start + 11] + b"\x01\x00" * blocks + b"\0;"


FILES = {
    "JPEG of 5,000 scans": lambda: scans(5_000),
    "JPEG of 2,000,000 segments": lambda: jpeg_with(b"\xff\xfe\x00\x02" * 2_000_000),
    "JPEG with 8 MB of fill": lambda: jpeg_with(b"\xff" * 8_000_000),
    "PNG of 1,000,000 chunks": lambda: png_with(chunk(b"teXt") * 1_000_000),
    "PNG with 10,000 profiles": lambda: png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**20), 9)) * 10_000),
    "TIFF of 4,000,000 strips": lambda: strips(4_000_000),
    "GIF of 8,000,000 blocks": lambda: gif_with(blocks=8_000_000),
    "PNG of 169 megapixels": lambda: encoded("PNG", (13_000, 13_000), "P"),
    "WebP of 169 megapixels": lambda: encoded("WEBP", (13_000, 13_000), lossless=True, method=0),
    "GIF of 169 megapixels": lambda: encoded("GIF", (13_000, 13_000), "P"),
    "JPEG of 169 megapixels": lambda: encoded("JPEG", (13_000, 13_000), quality=5),
}


async def measure(data: bytes) -> None:
    from qvl import media
    from qvl.errors import MediaError

    small = encoded("PNG", (64, 64), "L")
    await media.aload(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worst = 0.0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal worst
        while not done.is_set():
            began = time.perf_counter()
            await media.aready(await media.aload(small, decode=False))
            worst = max(worst, time.perf_counter() - began)
            await asyncio.sleep(0.01)

    async def ask() -> str:
        try:
            await media.aready(await media.aload(data, decode=False))
        except MediaError as exc:
            return str(exc)
        return "decoded"

    began = time.perf_counter()
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.05)
    answers = await asyncio.gather(ask(), ask())
    took = time.perf_counter() - began - 0.05
    done.set()
    await watching
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{worst:.2f} s | {took:.2f} s | +{grown:.0f} MB | {answers[0][:100]}")


def main(names: list[str]) -> None:
    for name in names or FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "picture")
            path.write_bytes(FILES[name]())
            size = path.stat().st_size / 1e6
            command = [sys.executable, __file__, "--file", str(path)]
            try:
                output = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stdout.strip()
            except subprocess.TimeoutExpired:
                output = f"- | more than {LIMIT} s | - | ended"
            print(f"{name} | {size:.2f} MB | {output}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--file"]:
        asyncio.run(measure(Path(sys.argv[2]).read_bytes()))
    else:
        main(sys.argv[1:])
