"""Files that are built to be costly: refused by what they are made of, on one line, before a decoder works on them."""

from __future__ import annotations

import asyncio
import functools
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qvl import media
from qvl.errors import MediaError
from qvl.media import file_structure as structure
from qvl.media.policy import MediaPolicy


def encoded(form: str, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 90 if mode in "LP" else "teal").save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(extra: bytes, at: int = 33) -> bytes:
    data = encoded("PNG")
    return data[:at] + extra + data[at:]


def scans(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A progressive JPEG whose last scan, with its table, is there again and again."""
    data = encoded("JPEG", size, progressive=True)
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * number + b"\xff\xd9"


def jpeg_with(extra: bytes) -> bytes:
    return b"\xff\xd8" + extra + encoded("JPEG")[2:]


def one_scan_each() -> bytes:
    """A baseline JPEG whose components come in scans of their own, over and over."""
    data = encoded("JPEG", subsampling=0)
    start = data.index(b"\xff\xda")
    alone = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[start + 14 : -2]
    return data[:start] + alone * 100 + b"\xff\xd9"


def tiff(*tags: tuple[int, int, int, int], order: str = "<", repeat: int = 1) -> bytes:
    size = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries = b"".join(struct.pack(order + "HHII", *tag) for tag in (*size, *tags)) * repeat
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries) // 12) + entries + bytes(400_000)


def gif_with(extra: bytes, *, blocks: bytes = b"") -> bytes:
    data = encoded("GIF", mode="P")
    start = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:start] + extra + (data[start : start + 11] + blocks + b"\0;" if blocks else data[start:])


def run_length_bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", 1100, 0, 0, 54 + 1024)
        + head
        + bytes(1024)
        + bytes([min(width, 255), 0, 0, 0]) * height
        + b"\0\1"
    )


@pytest.fixture
def data(request: pytest.FixtureRequest) -> bytes:
    """Made when its test runs, since some take long to make."""
    made: bytes = request.param()
    return made


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: scans(70), "64 scans"),
        (lambda: one_scan_each(), "64 scans"),
        (lambda: jpeg_with(b"\xff\xfe\x00\x02" * 2_001), "2000 segments"),
        (lambda: jpeg_with(b"\xff" * 20_000), "bytes of fill"),
        (lambda: jpeg_with(b"\xff\xfe\x00\x02" + b"junk" * 5_000), "bytes of fill"),
        (lambda: jpeg_with(b"\xff\xe1\x00\x09Exif\0\0\0" * 9), "EXIF segments"),
        (lambda: jpeg_with((b"\xff\xed\x40\x10Photoshop 3.0\0" + b"8BIM" * 4_096) * 2), "Photoshop records"),
        (lambda: png_with(chunk(b"teXt") * 20_001), "20000 chunks"),
        (lambda: png_with(chunk(b"IDAT") * 20_001), "20000 chunks"),
        (lambda: png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1000))) * 17), "16 compressed texts"),
        (lambda: png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1000))) * 2), "1 colour profile"),
        (lambda: tiff((273, 4, 32_769, 100)), "32768 strips"),
        (lambda: tiff((324, 4, 2**31, 100), order=">"), "32768 strips"),
        (lambda: tiff((258, 3, 70_000, 100)), "tag 258"),
        (lambda: tiff(repeat=900), "4096 tags"),
        (lambda: tiff((34665, 4, 1, 300_000))[:300_000] + b"\xff\xff" + bytes(99), "4096 tags"),
        (lambda: gif_with(b"", blocks=b"\x01\x00" * 150_000), "blocks in a GIF"),
        (lambda: gif_with(b"\x21\xfe" + (b"\xff" + bytes(255)) * 1_100 + b"\0"), "comments in a GIF"),
        (lambda: gif_with(b"\x21\xfe\x00" * 110_000), "blocks in a GIF"),
        (lambda: gif_with(b"\x00" * 110_000), "blocks in a GIF"),
        (lambda: run_length_bmp(2_000, 2_000), "run-length BMP"),
    ],
    indirect=["data"],
)
def test_more_parts_than_any_real_picture_has_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        media.load(data)
    assert "\n" not in str(caught.value)
    assert "limit" in str(caught.value)
    assert caught.value.hint
    assert caught.value.code == "image_too_large"


def test_codes_that_begin_like_a_fill_are_none() -> None:
    values = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    values[:16, :16] = 0
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG", quality=98)
    data = out.getvalue()
    scan = data.find(b"\xff\xda")
    assert data[scan + 2 + int.from_bytes(data[scan + 2 : scan + 4]) :][:2] == b"\xff\x00"
    assert len(data) > structure.MAX_FILL
    assert media.load(data).width == 160


def test_the_scans_of_a_large_picture_are_counted_by_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "MAX_SCAN_PIXELS", 64 * 48 * 20)
    assert media.load(scans(5)).width == 64
    with pytest.raises(MediaError, match="20 scans in a JPEG of 3072 pixels"):
        media.load(scans(15))


def test_a_scan_count_ends_where_the_picture_does() -> None:
    film = b"\xff\xda" * 10_000
    assert media.load(encoded("JPEG", progressive=True) + film).width == 64
    assert media.load(encoded("JPEG") + film).width == 64
    # An end that is only spelt in a comment ends nothing.
    hidden = scans(70)
    start = hidden.index(b"\xff\xda")
    hidden = hidden[:start] + b"\xff\xfe\x00\x04\xff\xd9" + hidden[start:]
    with pytest.raises(MediaError, match="scans"):
        media.load(hidden)


@pytest.mark.parametrize(
    "data",
    [
        lambda: scans(20),
        lambda: jpeg_with(b"\xff\xe2\x00\x04ab" * 300),
        lambda: jpeg_with(b"\xff" * 100),
        lambda: png_with(chunk(b"teXt", b"key\0value") * 500),
        lambda: png_with(chunk(b"IDAT") * 9_000),
        lambda: encoded("GIF", (800, 600), "P", comment=b"x" * 1000),
        lambda: encoded("TIFF", (64, 4000), compression="tiff_lzw"),
        lambda: encoded("TIFF", (64, 48), compression="jpeg"),
        lambda: run_length_bmp(100, 100),
    ],
    indirect=True,
)
def test_what_programs_write_passes(data: bytes) -> None:
    picture = media.load(data)
    assert picture.rgb().size == (picture.width, picture.height)


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A PNG or JPEG that claims another size in its header."""
    if data.startswith(b"\x89PNG"):
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg(**options: object) -> bytes:
    return encoded("JPEG", **options)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (lambda: jpeg(progressive=True, subsampling=0), (6_000, 4_000)),
        (lambda: jpeg(progressive=True, subsampling=0), (6_240, 4_160)),
        (lambda: jpeg(progressive=True, subsampling=2), (6_000, 4_000)),
        (lambda: jpeg(progressive=True, subsampling=2), (8_000, 6_000)),
        (lambda: jpeg(progressive=True, subsampling=2), (7_500, 5_000)),
        (lambda: jpeg(), (13_000, 13_000)),
        (lambda: encoded("PNG", mode="RGBA"), (6_000, 4_000)),
        (lambda: encoded("PNG", mode="RGBA"), (6_240, 4_160)),
        (lambda: encoded("PNG"), (8_100, 8_200)),
        (lambda: encoded("WEBP", (4_800, 3_300), quality=1, method=0), None),
    ],
    indirect=["data"],
)
def test_pictures_of_cameras_and_designers_pass_by_default(data: bytes, size: tuple[int, int] | None) -> None:
    picture = media.load(claiming(data, *size) if size else data, decode=False)
    assert picture.large


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (lambda: jpeg(progressive=True, subsampling=0), (6_600, 4_400)),
        (lambda: jpeg(progressive=True, subsampling=2), (13_000, 13_000)),
        (lambda: encoded("PNG"), (13_000, 13_000)),
        (lambda: encoded("PNG", mode="L"), (13_000, 13_000)),
        (lambda: encoded("PNG", mode="RGBA"), (13_000, 13_000)),
        pytest.param(lambda: encoded("WEBP", (13_000, 13_000), quality=1, method=0), None, marks=pytest.mark.slow),
    ],
    indirect=["data"],
)
def test_larger_ones_are_refused_by_their_headers(data: bytes, size: tuple[int, int] | None) -> None:
    with pytest.raises(MediaError, match=r"more than the limit of 256 MiB .*--max-decode-mb"):
        media.load(claiming(data, *size) if size else data, decode=False)


@pytest.mark.parametrize(
    ("data", "policy"),
    [
        (lambda: encoded("PNG", (13_000, 13_000), "1"), MediaPolicy()),
        (lambda: encoded("GIF", (5_500, 5_500), "P"), MediaPolicy()),
        (lambda: encoded("WEBP", (2_000, 2_000)), MediaPolicy(max_decode_bytes=60 * 2**20)),
        (
            lambda: encoded("JPEG", (2_000, 2_000), progressive=True, subsampling=0),
            MediaPolicy(max_decode_bytes=30 * 2**20),
        ),
        (lambda: encoded("TIFF", (2_000, 2_000)), MediaPolicy(max_decode_bytes=30 * 2**20)),
    ],
    indirect=["data"],
)
def test_what_would_take_too_much_memory_is_refused_by_its_header(data: bytes, policy: MediaPolicy) -> None:
    with pytest.raises(MediaError, match="MiB, more than the limit of") as caught:
        media.load(data, policy, decode=False)
    assert "max_decode_bytes" in str(caught.value)


@functools.cache
def noise() -> Image.Image:
    return Image.effect_noise((2_000, 2_000), 200).convert("RGB")


def noisy(form: str, **options: object) -> bytes:
    out = io.BytesIO()
    (noise().convert("P") if form == "GIF" else noise()).save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        lambda: noisy("JPEG"),
        lambda: noisy("JPEG", progressive=True, quality=95),
        lambda: noisy("PNG", compress_level=1),
        lambda: noisy("GIF"),
        lambda: noisy("BMP"),
    ],
    indirect=True,
    ids=["jpeg", "progressive", "png", "gif", "bmp"],
)
@pytest.mark.parametrize("decode", [media.load, lambda data, policy: media.load(data, policy, decode=False).rgb()])
def test_decoding_is_stopped_when_it_has_worked_too_long(data: bytes, decode: Callable[..., object]) -> None:
    with pytest.raises(
        MediaError, match=r"takes more than 0\.002 s of processor time .*MediaPolicy\.max_decode_seconds"
    ):
        decode(data, MediaPolicy(max_decode_seconds=0.002))
    assert decode(data, MediaPolicy())


MEASURE = """
import resource, sys
from qvl import media
from qvl.errors import MediaError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
media.load(open(sys.argv[2], "rb").read()).rgb()
before = peak()
try:
    media.load(sys.argv[1])
except MediaError:
    pass
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("form", "size", "mode", "options"),
    [
        ("PNG", (13_300, 13_300), "1", {}),
        pytest.param("PNG", (8_100, 8_200), "RGB", {"compress_level": 1}, marks=pytest.mark.slow),
        ("PNG", (6_240, 4_160), "RGBA", {"compress_level": 1}),
        ("WEBP", (4_000, 4_000), "RGB", {"quality": 1, "method": 0}),
        pytest.param("JPEG", (6_240, 4_160), "RGB", {"progressive": True, "subsampling": 0}, marks=pytest.mark.slow),
        ("JPEG", (8_000, 6_000), "RGB", {"progressive": True, "subsampling": 2}),
        ("JPEG", (13_000, 13_000), "L", {"quality": 1}),
        ("TIFF", (5_700, 5_700), "RGB", {}),
    ],
)
def test_no_picture_takes_more_than_the_limit_on_decoding(
    form: str, size: tuple[int, int], mode: str, options: dict, tmp_path
) -> None:
    (tmp_path / "large").write_bytes(encoded(form, size, mode, **options))
    (tmp_path / "small").write_bytes(encoded(form, (64, 64), mode, **options))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Beside the pixels there are the file itself and the decoder's own tables.
    assert int(done.stdout) <= MediaPolicy().max_decode_bytes // 2**20 + 8


def test_large_pictures_are_decoded_one_at_a_time_and_others_beside_them() -> None:
    large = encoded("PNG", (4_600, 4_600), "RGB", compress_level=1)
    small = encoded("PNG")
    order: list[str] = []

    async def main() -> None:
        opened = [await media.aload(large + bytes([n]), decode=False) for n in range(4)]
        assert all(picture.large for picture in opened)

        async def one(picture: media.Picture, name: str) -> None:
            await media.aready(picture)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for picture in opened:
                group.create_task(one(picture, "large"))
            await asyncio.sleep(0)
            little = await media.aload(small, decode=False)
            assert not little.large
            group.create_task(one(little, "small"))

    asyncio.run(main())
    # With four large ones asked for first, in as many threads as there are processors, it would be among the last.
    assert order.index("small") <= 1
    assert len(order) == 5
