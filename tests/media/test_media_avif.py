"""AVIF whose boxes say another size than what is coded."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image, features

from qvl import media
from qvl.errors import MediaError
from qvl.media import avif_structure

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def avif(size: tuple[int, int], mode: str = "RGB", frames: int = 1, **options: Any) -> bytes:
    held = io.BytesIO()
    image = Image.new(mode, size, "red")
    more = [Image.new(mode, size, "blue")] * (frames - 1)
    image.save(held, "AVIF", **({"save_all": True, "append_images": more} if more else {}), **options)
    return held.getvalue()


def saying(data: bytes, width: int, height: int) -> bytes:
    """The same with another size in every box that tells one."""
    told = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    found = bytearray(data)
    at = -1
    while (at := data.find(b"ispe", at + 1)) >= 0:
        found[at + 8 : at + 16] = told
    at = -1
    while (at := data.find(b"tkhd", at + 1)) >= 0:
        end = at - 4 + int.from_bytes(data[at - 4 : at], "big")
        found[end - 8 : end] = (width << 16).to_bytes(4, "big") + (height << 16).to_bytes(4, "big")
    return bytes(found)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (333, 17), (1500, 1200)])
def test_a_picture_of_the_size_it_says_passes(mode: str, frames: int, size: tuple[int, int]) -> None:
    picture = media.load(avif(size, mode, frames))
    assert (picture.width, picture.height) == size


@pytest.mark.parametrize(
    "options", [{"tile_rows": 1, "tile_cols": 1}, {"autotiling": False, "speed": 10}, {"codec": "aom"}]
)
def test_however_it_is_encoded(options: dict[str, Any]) -> None:
    assert media.load(avif((600, 400), **options)).width == 600


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("frames", [1, 2])
def test_one_that_is_larger_than_it_says_is_refused_before_it_is_decoded(mode: str, frames: int) -> None:
    with pytest.raises(MediaError, match="64 x 64 pixels, but more are coded in it") as caught:
        media.load(saying(avif((2048, 2048), mode, frames), 64, 64), decode=False)
    assert caught.value.code == "image_too_large"


def test_every_cut_and_every_byte_that_is_broken_ends_in_an_error_or_a_picture() -> None:
    whole = avif((64, 64))
    meta = whole.index(b"meta")
    for at in range(meta, len(whole)):
        broken = [whole[:at], whole[:at] + b"\xff" + whole[at + 1 :], whole[:at] + b"\0" + whole[at + 1 :]]
        for data in broken:
            with suppress(MediaError):
                avif_structure.check(data, (64, 64), "it")


@pytest.mark.parametrize(
    ("bits", "size"),
    [
        # still_picture and reduced header; level; 8 and 8 bits; the sizes less one.
        ("000" "1" "1" "00000" "0111" "0111" "11111111" "00111111", (256, 64)),
        # no timing, no delay, one operating point of a level with a tier.
        ("000" "0" "0" "0" "0" "00000" + "0" * 12 + "01000" "1" "0011" "0011" "1111" "0111", (16, 8)),
        # timing with an interval, a decoder model, delays shown.
        (
            "000" "0" "0" "1" + "0" * 64 + "1" "00101" "1" "00010" + "0" * 42 + "1" "00000" + "0" * 12
            + "00001" "1" "000" "000" "1" "1" "1010" "0011" "0011" "1111" "0111",
            (16, 8),
        ),
    ],
)  # fmt: skip
def test_sequence_headers_of_every_form_are_read(bits: str, size: tuple[int, int]) -> None:
    bits += "0" * (-len(bits) % 8)
    header = int(bits, 2).to_bytes(len(bits) // 8, "big")
    coded = b"\x12\x00\x0a" + bytes([len(header)]) + header
    assert list(avif_structure._sizes(coded, avif_structure._Budget(9))) == [size]


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def grid(tiles: int, edge: int, *, within: bool = False) -> bytes:
    """A grid of tiles whose sequence headers say `edge`; their data stands in the file, or in the box `idat`."""
    header = int("000110000011111111" + f"{edge - 1:016b}" * 2 + "0" * 6, 2).to_bytes(7, "big")
    coded = b"\x12\x00\x0a\x07" + header
    kinds = [b"grid", *[b"av01"] * tiles]
    named = [
        box(b"infe", b"\2\0\0\0" + number.to_bytes(2, "big") + b"\0\0" + kind + b"\0")
        for number, kind in enumerate(kinds)
    ]

    def whole(start: int) -> bytes:
        places = b"".join(
            number.to_bytes(2, "big") + bytes([0, within, 0, 0, 0, 1])
            + (start + (number - 1) * len(coded)).to_bytes(4, "big") + len(coded).to_bytes(4, "big")
            for number in range(1, tiles + 1)
        )  # fmt: skip
        inner = box(b"iinf", b"\0\0\0\0" + len(kinds).to_bytes(2, "big") + b"".join(named))
        inner += box(b"iloc", b"\1\0\0\0\x44\0" + tiles.to_bytes(2, "big") + places)
        inner += box(b"idat", coded * tiles) if within else b""
        meta = box(b"ftyp", b"avif") + box(b"meta", b"\0\0\0\0" + inner)
        return meta if within else meta + box(b"mdat", coded * tiles)

    return whole(0) if within else whole(len(whole(0)) - tiles * len(coded))


@pytest.mark.parametrize("within", [False, True])
def test_the_tiles_of_a_grid_count_together(within: bool) -> None:
    avif_structure.check(grid(4, 512, within=within), (1024, 1024), "it")
    # Colours and alpha, each of four tiles that are hardly filled.
    avif_structure.check(grid(8, 512, within=within), (520, 520), "it")
    for tiles, edge in ((4, 2048), (64, 1024)):
        with pytest.raises(MediaError, match="more are coded in it"):
            avif_structure.check(grid(tiles, edge, within=within), (1024, 1024), "it")


def test_a_file_without_coded_pictures_or_with_too_many_parts_is_broken() -> None:
    with pytest.raises(MediaError, match="no coded picture"):
        avif_structure.check(box(b"ftyp", b"avif"), (64, 64), "it")
    with pytest.raises(MediaError, match="more than 10000 parts"):
        avif_structure.check(box(b"free", b"") * 20_000, (64, 64), "it")
