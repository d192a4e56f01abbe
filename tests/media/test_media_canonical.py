"""Every kind of encoding gives one canonical RGB picture."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from qvl import media
from qvl.errors import MediaError
from qvl.media.image_header import exif_orientation

HERE = Path(__file__).parent
PINNED = json.loads((HERE / "pinned.json").read_text())
PLAIN = PINNED["plain.png"]["pixels"]


def pixels_of(name: str) -> np.ndarray:
    return np.asarray(media.load(HERE / "fixtures" / name).rgb())


@pytest.mark.parametrize("name", sorted(PINNED))
def test_canonical_pixels_are_pinned(name: str, fixtures: Path) -> None:
    if name.endswith(".avif") and "avif" not in features.get_supported():
        pytest.skip("this Pillow reads no AVIF")
    picture = media.load(fixtures / name)
    image = picture.rgb()
    assert image.mode == "RGB"
    assert {
        "size": [picture.width, picture.height],
        "untouched": picture.untouched,
        "pixels": hashlib.sha256(image.tobytes()).hexdigest(),
    } == PINNED[name]
    assert image.size == (picture.width, picture.height)


def test_the_table_pins_every_fixture(fixtures: Path) -> None:
    assert sorted(path.name for path in fixtures.iterdir()) == sorted(PINNED)


@pytest.mark.parametrize(
    "name",
    [f"exif_{n}.png" for n in range(1, 9)]
    + ["exif_6.webp", "exif_6.tif", "exif_6_behind_pixels.png", "lossless.webp", "plain.bmp", "plain.gif", "plain.tif"]
    + ["animated.gif", "animated.png", "animated.webp", "pages.tif", "rgb16.png"],
)
def test_lossless_encodings_of_one_picture_agree(name: str) -> None:
    assert PINNED[name]["pixels"] == PLAIN


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_of_a_jpeg_shows_the_upright_picture(orientation: int) -> None:
    difference = pixels_of(f"exif_{orientation}.jpg").astype(int) - pixels_of("plain.png")
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("name", ["exif_3.jpg", "exif_6.png", "exif_6.tif", "exif_6.webp"])
def test_an_open_pil_image_is_turned_like_its_file(name: str, fixtures: Path) -> None:
    with Image.open(fixtures / name) as image:
        opened = media.load(image).rgb()
        turned_before = media.load(ImageOps.exif_transpose(image)).rgb()
    assert opened.tobytes() == media.load(fixtures / name).rgb().tobytes() == turned_before.tobytes()


def test_orientation_set_on_a_pil_image_in_memory_counts() -> None:
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    assert media.load(image).rgb().size == (2, 4)


def test_orientation_in_xmp_alone_turns_nothing(encoded) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", xmp=xmp)
    assert media.load(data).rgb().size == (8, 4)
    with Image.open(io.BytesIO(data)) as image:
        assert media.load(image).rgb().size == (8, 4)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\x00\x00",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff",
        b"nonsense",
    ],
)
def test_a_broken_exif_block_turns_nothing(block: bytes, encoded) -> None:
    assert exif_orientation(block) == 1
    data = encoded(Image.new("RGB", (8, 4)), "WEBP", exif=block or b" ")
    assert media.load(data).rgb().size == (8, 4)


def test_hidden_colour_under_full_transparency_is_white() -> None:
    assert (pixels_of("rgba_hidden.png")[:16] == 255).all()


@pytest.mark.parametrize("name", ["rgba_hidden.png", "la.png", "rgba.webp", "palette_alpha.png"])
def test_half_transparent_pixels_are_mixed_with_white(name: str, fixtures: Path) -> None:
    with Image.open(fixtures / name) as image:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels_of(name) - expected).max() <= 1


@pytest.mark.parametrize("name", ["rgb_transparent_colour.png", "rgb16_transparent.png"])
def test_the_transparent_colour_of_a_png_is_white(name: str) -> None:
    pixels, plain = pixels_of(name), pixels_of("plain.png")
    named = (plain == plain[0, 0]).all(axis=-1)
    assert named.any()
    assert (pixels[named] == 255).all()
    assert (pixels[~named] == plain[~named]).all()


def test_the_transparent_level_of_a_two_bit_png_is_white() -> None:
    assert pixels_of("grey2_transparent.png")[0, :4, 0].tolist() == [0, 255, 170, 255]


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(name: str) -> None:
    assert (pixels_of(name)[..., 0] == pixels_of("plain.png")[..., 2]).all()


def test_the_transparent_level_of_sixteen_bit_grey_is_white() -> None:
    pixels = pixels_of("grey16_transparent.png")
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, 1:] == pixels_of("grey16.png")[:, 1:]).all()


def test_cmyk_is_not_inverted() -> None:
    assert np.abs(pixels_of("cmyk.jpg").astype(int) - pixels_of("plain.png")).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_pil_becomes_rgb(mode: str) -> None:
    source = Image.linear_gradient("L").resize((16, 8))
    if mode == "PA":
        image = source.convert("P").convert("PA")
    elif mode in ("La", "RGBa"):
        image = source.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "HSV":
        image = source.convert("RGB").convert("HSV")
    else:
        image = source.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "RGBX") else source.convert(mode)
    assert image.mode == mode
    direct = (image.convert(mode.upper()) if mode in ("La", "RGBa") else image).convert("RGB")
    difference = np.asarray(media.load(image).rgb()).astype(int) - np.asarray(direct).astype(int)
    assert np.abs(difference).max() <= 1


def test_deep_grey_in_memory_is_scaled() -> None:
    levels = np.array([[0, 255, 256, 65535]], np.uint16)
    expected = [0, 0, 1, 255]
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert np.asarray(media.load(image).rgb())[0, :, 0].tolist() == expected
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(media.load(floats).rgb())[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("levels", [np.array([[70000]], np.int32), np.array([[-1]], np.int32), np.array([[9.5]], "f4")])
def test_levels_beyond_the_range_of_their_mode_are_refused(levels: np.ndarray) -> None:
    with pytest.raises(MediaError, match=r"16 bits|from 0 to 1"):
        media.load(Image.fromarray(levels))
