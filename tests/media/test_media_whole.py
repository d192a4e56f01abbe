"""What passes on untouched is whole: the cheap check never says so of what a decoder would refuse."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin, PngImagePlugin

from qvl import media
from qvl.errors import MediaError
from qvl.media import jpeg_integrity
from qvl.media.jpeg_front import jpeg_front
from qvl.media.png_integrity import whole_png

FIXTURES = Path(__file__).parent / "fixtures"
PLAIN = ("plain.png", "plain.jpg", "progressive.jpg", "lossy.webp", "lossless.webp")
WIDTH, HEIGHT = 6, 4
JPEGS: dict[str, dict[str, int]] = {
    "JPEG": {},
    "progressive": {"progressive": 1},
    "restarts": {"restart_marker_blocks": 3},
    "progressive with restarts": {"progressive": 1, "restart_marker_rows": 1},
    "full colour": {"subsampling": 0, "quality": 95},
}
ROWS = b"".join(b"\x00" + bytes(range(row, row + 3 * WIDTH)) for row in range(HEIGHT))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*middle: bytes, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(middle) + chunk(b"IEND", b"")


def pixels(rows: bytes = ROWS) -> bytes:
    return chunk(b"IDAT", zlib.compress(rows))


def accepts(act: Callable[[], object]) -> bool:
    try:
        act()
    except MediaError:
        return False
    return True


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_plain_png_is_known_to_be_whole_without_a_decoder(level: int, pieces: int) -> None:
    packed = zlib.compress(ROWS, level)
    step = -(-len(packed) // pieces)
    parts = [chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step)]
    data = png(chunk(b"tEXt", b"Title\x00mug"), *parts)
    assert whole_png(data, WIDTH, HEIGHT)
    assert whole_png(data + b"junk behind the end", WIDTH, HEIGHT)
    assert media.load(data).data == data


@pytest.mark.parametrize(
    "data",
    [
        png(),
        png(pixels(ROWS[:-1])),
        png(pixels(ROWS + b"\x00")),
        png(pixels(b"\x05" + ROWS[1:])),
        png(chunk(b"IDAT", zlib.compress(ROWS)[:-1])),
        png(chunk(b"IDAT", zlib.compress(ROWS)[:-4] + b"\x00\x00\x00\x00")),
        png(chunk(b"IDAT", b"\x00\x00" + zlib.compress(ROWS)[2:])),
        png(pixels(), depth=16),
        png(pixels(), colour=6),
        png(pixels(), interlace=1),
        png(chunk(b"acTL", bytes(8)), pixels()),
        png(chunk(b"CgBI", bytes(4)), pixels()),
        png(chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)), pixels()),
        png(pixels(), chunk(b"tEXt", b"Title\x00mug"), pixels()),
        png(pixels()).replace(b"IEND", b"IENX"),
        png(pixels())[:-12],
        png(pixels())[:-13],
        png(pixels())[:40],
        b"",
    ],
)
def test_what_only_a_decoder_can_tell_is_left_to_it(data: bytes) -> None:
    assert not whole_png(data, WIDTH, HEIGHT)


def test_a_png_of_another_size_than_its_header_says_is_not_whole() -> None:
    assert not whole_png(png(pixels()), HEIGHT, WIDTH)


def test_a_wrong_checksum_is_not_whole() -> None:
    data = bytearray(png(pixels()))
    data[data.index(b"IDAT") + 8] ^= 1
    assert not whole_png(bytes(data), WIDTH, HEIGHT)


def test_a_second_header_that_a_decoder_believes_is_refused() -> None:
    second = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    with pytest.raises(MediaError, match="cut short or broken"):
        media.load(png(chunk(b"IHDR", second), pixels()), decode=False).checked()


@pytest.mark.parametrize("rows", [ROWS[:-1], b"\x05" + ROWS[1:], b""])
def test_a_png_with_all_checksums_right_but_not_all_pixels_is_refused(rows: bytes) -> None:
    with pytest.raises(MediaError, match="cut short or broken"):
        media.load(png(pixels(rows)))


def test_no_more_is_inflated_than_the_size_says() -> None:
    bomb = zlib.compress(bytes(2**24), 9)
    assert not whole_png(png(chunk(b"IDAT", bomb)), WIDTH, HEIGHT)


@pytest.mark.parametrize("made", ["interlaced", "text behind the pixels"])
def test_rare_kinds_pass_untouched_all_the_same(made: str) -> None:
    if made == "interlaced":
        data = png(chunk(b"IDAT", zlib.compress(_adam7())), interlace=1)
    else:
        data = png(pixels(), chunk(b"tEXt", b"Title\x00mug"))
    picture = media.load(data)
    assert picture.untouched
    assert picture.data == data


def _adam7() -> bytes:
    """WIDTH x HEIGHT black pixels in the seven passes of PNG, section 8."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b""
    for x, y, across, down in passes:
        width, height = len(range(x, WIDTH, across)), len(range(y, HEIGHT, down))
        rows += (b"\x00" + bytes(3 * width)) * height if width else b""
    return rows


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_checking_refuses_exactly_what_decoding_refuses(draw: st.DataObject) -> None:
    data = bytearray(_noisy(draw.draw(st.sampled_from(["PNG", *JPEGS]))))
    made = draw.draw(st.sampled_from(["cut", "bytes", "marker", "gap", "fill", "two in one"]))
    at = draw.draw(st.integers(40, len(data) - 2))
    if made == "marker":
        data[at:at] = bytes([255, draw.draw(st.integers(0, 255))]) + draw.draw(st.binary(max_size=6))
    elif made == "gap":
        del data[at : at + draw.draw(st.integers(1, 300))]
    elif made == "fill":
        data[at:at] = bytes([draw.draw(st.sampled_from([0, 255]))]) * draw.draw(st.integers(1, 300))
    elif made == "two in one":
        data[at:] = _noisy(draw.draw(st.sampled_from(list(JPEGS))))[draw.draw(st.integers(2, 700)) :]
    elif made == "cut":
        del data[draw.draw(st.integers(40, len(data))) :]
        if draw.draw(st.booleans()):
            data += b"\xff\xd9" if data[:1] == b"\xff" else chunk(b"IEND", b"")
    else:
        for _ in range(draw.draw(st.integers(1, 4))):
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        late = media.load(bytes(data), decode=False)
    except MediaError:
        return
    again = media.load(bytes(data), decode=False)
    assert accepts(late.checked) == accepts(again.rgb)


def _noisy(form: str) -> bytes:
    values = np.random.default_rng(5).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG" if form == "PNG" else "JPEG", **JPEGS.get(form, {}))
    return out.getvalue()


def skeleton(data: bytes) -> bytes | None:
    front = jpeg_front(data)
    return None if front is None else jpeg_integrity.skeleton(data, front)


@pytest.mark.parametrize("form", JPEGS)
def test_of_a_whole_jpeg_a_decoder_sees_the_segments_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A segment of its own, since what was accepted before is not asked of the decoder again.
    data = _noisy(form)
    data = data[:2] + b"\xff\xe9\x00\x0a" + os.urandom(8) + data[2:]
    bare = skeleton(data)
    assert bare is not None
    assert len(bare) < len(data)
    loaded = []
    load = JpegImagePlugin.JpegImageFile.load

    def noted(image: JpegImagePlugin.JpegImageFile) -> object:
        loaded.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", noted)
    assert media.load(data, decode=False).checked().data == data
    assert loaded == [(1, 1)]
    commented = data[:2] + b"\xff\xfe\x00\x08a text" + data[2:]
    assert media.load(commented, decode=False).checked().data == commented
    assert loaded == [(1, 1), (1, 1)]
    other = data.replace(b"\xff\xe9\x00\x0a", b"\xff\xfe\x00\x03z" + b"\xff\xe9\x00\x0a") + b"behind"
    assert media.load(other, decode=False).checked().data == other
    assert loaded == [(1, 1), (1, 1)]


@pytest.mark.parametrize(("piece", "few"), [(1, 0), (7, 0), (600, 0), (2**19, 0), (2**19, 2**20)])
def test_segments_behind_codes_are_found_wherever_the_search_is_parted(
    piece: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jpeg_integrity, "_PIECE", piece)
    monkeypatch.setattr(jpeg_integrity, "_FEW", few)
    segment = b"\xff\xe9\x00\x0a12345678"
    for form in JPEGS:
        data = _noisy(form)
        end = data.rindex(b"\xff\xd9")
        for before in range(300, 330):
            moved = data[: end - before].removesuffix(b"\xff") + segment + data[end - before : end] + b"\xff\xd9"
            bare = skeleton(moved)
            assert bare is not None, (form, before)
            assert segment in bare, (form, before)


def test_a_file_of_nothing_but_markers_is_left_to_a_decoder() -> None:
    data = _noisy("JPEG")
    end = data.rindex(b"\xff\xd9")
    for count in (9_000, 11_000, 600_000):
        bare = skeleton(data[:end] + b"\xff\x01" * count + b"\xff\xd9")
        assert (bare is not None) == (count < 10_000)


@pytest.mark.parametrize("form", JPEGS)
def test_a_jpeg_without_its_end_is_left_to_a_decoder(form: str) -> None:
    data = _noisy(form)
    for percent in range(100):
        assert skeleton(data[: len(data) * percent // 100]) is None


def test_a_jpeg_larger_than_decoders_take_is_left_to_them() -> None:
    data = bytearray(_noisy("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 1_000, 65_501)
    assert skeleton(bytes(data)) is None
    with pytest.raises(MediaError, match="cut short or broken"):
        media.load(bytes(data), decode=False).checked()


@pytest.mark.parametrize("name", PLAIN)
def test_a_checked_picture_still_has_its_bytes_and_pixels(name: str) -> None:
    source = (FIXTURES / name).read_bytes()
    picture = media.load(source, decode=False)
    assert not picture.at_hand
    assert picture.checked() is picture
    assert picture.at_hand
    assert picture.data == source
    assert picture.rgb().tobytes() == media.load(source).rgb().tobytes()


def test_checking_what_will_be_encoded_decodes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    load = PngImagePlugin.PngImageFile.load

    def counted(image: PngImagePlugin.PngImageFile) -> object:
        opened.append(image)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", counted)
    picture = media.load(FIXTURES / "grey.png", decode=False).checked()
    assert not picture.at_hand
    assert picture.media_type == "image/png"
    assert picture.data
    assert len({id(image) for image in opened}) == 1


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_size_that_a_jpeg_tells_is_that_of_its_pixels(draw: st.DataObject) -> None:
    names = ["plain.jpg", "progressive.jpg", "exif_6.jpg", "grey.jpg", "cmyk.jpg", "two_in_one.jpg"]
    data = bytearray((FIXTURES / draw.draw(st.sampled_from(names))).read_bytes())
    for _ in range(draw.draw(st.integers(0, 3))):
        at = draw.draw(st.integers(2, min(400, len(data) - 1)))
        if draw.draw(st.booleans()):
            data[at] = draw.draw(st.integers(0, 255))
        else:
            data[at:at] = draw.draw(st.binary(max_size=6))
    try:
        picture = media.load(bytes(data), decode=False)
        decoded = picture.rgb()
    except MediaError:
        return
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        told = (image.size, image.mode)
    assert decoded.size == (picture.width, picture.height)
    assert sorted(decoded.size) == sorted(told[0])
    assert not picture.untouched or told == (decoded.size, "RGB")
