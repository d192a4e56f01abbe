"""HEIC of phones and JPEG XL, by the packages of the extra `formats`: read as others are; else the extra is named."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from qvl.errors import MediaError
from qvl.media import gate, image_header
from qvl.media.jxl_size import CONTAINER, jxl_size
from qvl.media.policy import MediaPolicy
from qvl.tiny.render import DrawnProduct, draw

pillow_heif = pytest.importorskip("pillow_heif")
pytest.importorskip("pillow_jxl")


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    return draw(DrawnProduct("NORVIK", "mug", "blue", 1), 3, (320, 200)).convert("RGB")


def heic(image: Image.Image, **options: object) -> bytes:
    held = io.BytesIO()
    pillow_heif.from_pillow(image).save(held, quality=90, **options)
    return held.getvalue()


def jxl(image: Image.Image, **options: object) -> bytes:
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(held, "JXL", **options)
    return held.getvalue()


@pytest.mark.parametrize("encode", [heic, jxl])
def test_they_are_read_as_other_pictures(encode, drawn: Image.Image) -> None:
    data = encode(drawn)
    picture = gate.load(data)
    assert (picture.width, picture.height, picture.media_type) == (320, 200, "image/png")
    difference = np.asarray(picture.rgb(), np.int16) - np.asarray(drawn, np.int16)
    assert np.abs(difference).mean() < 6
    small = gate.load(data, MediaPolicy(max_pixels=16_000))
    assert small.rgb().size == (small.width, small.height) == (160, 100)
    with pytest.raises(MediaError):
        gate.load(data[: len(data) // 2])
    with pytest.raises(MediaError, match="accepted are JPEG, PNG"):
        gate.load(data, MediaPolicy(formats=frozenset({"PNG", "JPEG"})))


def test_a_turned_phone_is_upright(drawn: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = gate.load(heic(drawn, exif=exif.tobytes()))
    assert picture.rgb().size == (200, 320) == picture.original
    turned = np.asarray(picture.rgb(), np.int16) - np.asarray(drawn.transpose(Image.Transpose.ROTATE_270), np.int16)
    assert np.abs(turned).mean() < 6


@pytest.mark.parametrize(
    "size", [(8, 8), (64, 64), (320, 200), (256, 256), (257, 3), (300, 225), (640, 360), (1000, 500), (7, 1025)]
)
def test_the_size_of_jpeg_xl_is_known_before_it_is_decoded(size: tuple[int, int]) -> None:
    assert jxl_size(jxl(Image.new("RGB", size, "red"))) == size
    boxed = jxl(Image.new("RGB", size, "red"), exif=Image.Exif().tobytes() + b"\0" * 8)
    assert jxl_size(boxed) == size


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not small, the longest form of a height, ratio 1: 2**30 by 2**30 pixels.
    bits = 0 | 3 << 1 | (2**30 - 1) << 3 | 1 << 33
    bomb = b"\xff\x0a" + bits.to_bytes(10, "little")
    assert jxl_size(bomb) == (2**30, 2**30)
    with pytest.raises(MediaError, match="more than the limit") as caught:
        gate.load(bomb)
    assert caught.value.code == "image_too_large"
    with pytest.raises(MediaError, match=r"takes .* MiB, more than the limit"):
        gate.load(jxl(Image.new("RGB", (800, 800))), MediaPolicy(max_decode_bytes=2**20))
    assert jxl_size(CONTAINER + b"\0\0\0\0jbrd" * 9) is None
    assert jxl_size(b"\xff\x0a") is None


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("pillow_heif.as_plugin", "pillow_jxl.JpegXLImagePlugin"):
        monkeypatch.setitem(sys.modules, module, None)
    image_header._decoder.cache_clear()
    yield
    image_header._decoder.cache_clear()


def test_without_the_extra_its_name_is_told(absent: None, drawn: Image.Image) -> None:
    for encode, kind in ((heic, "HEIC"), (jxl, "JPEG XL")):
        data = encode(drawn)
        with pytest.raises(MediaError, match=rf"it starts like {kind}; pip install 'qvl\[formats\]' reads it"):
            gate.load(data)
