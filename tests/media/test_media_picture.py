"""What a Picture promises to those who hold one."""

from __future__ import annotations

import base64
import copy
import gc
import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl import media
from qvl.errors import MediaError
from qvl.media.picture import Picture
from qvl.media.policy import MediaPolicy
from qvl.media.smart_resize import budget


@pytest.mark.parametrize("name", ["plain.png", "plain.jpg", "progressive.jpg", "lossy.webp", "lossless.webp"])
def test_plain_pictures_pass_through_byte_for_byte(name: str, fixtures: Path) -> None:
    source = (fixtures / name).read_bytes()
    picture = media.load(source)
    assert picture.untouched
    assert picture.data == source
    assert picture.media_type == {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}[name.split(".")[1]]


@pytest.mark.parametrize(
    "name", ["exif_6.jpg", "rgba_hidden.png", "grey.png", "grey16.png", "rgb16.png", "cmyk.jpg", "animated.webp"]
)
def test_others_are_sent_as_a_lossless_png_of_the_canonical_pixels(name: str, fixtures: Path) -> None:
    picture = media.load(fixtures / name)
    assert not picture.untouched
    assert picture.media_type == "image/png"
    with Image.open(io.BytesIO(picture.data)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.tobytes() == picture.rgb().tobytes()


def test_junk_behind_the_picture_does_no_harm(fixtures: Path) -> None:
    data = (fixtures / "plain.jpg").read_bytes() + b"trailing junk"
    picture = media.load(data)
    assert picture.data == data
    assert picture.rgb().tobytes() == media.load(fixtures / "plain.jpg").rgb().tobytes()


def test_every_way_to_hand_over_the_same_bytes_gives_the_same_picture(fixtures: Path) -> None:
    path = fixtures / "plain.jpg"
    data = path.read_bytes()
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    percent = "data:image/jpeg," + "".join(f"%{byte:02x}" for byte in data)
    read_to_its_end = io.BytesIO(data)
    read_to_its_end.read()
    ways = [str(path), path, path.as_uri(), data, bytearray(data), memoryview(data), read_to_its_end, url, percent]
    ways += [url.upper().replace(url.partition(",")[2].upper(), url.partition(",")[2]), f"  {url}\n", url.rstrip("=")]
    ways += [url.replace("+", "-").replace("/", "_").replace("data:image_jpeg", "data:image/jpeg"), media.load(data)]
    pictures = [media.load(way) for way in ways]
    with path.open("rb") as file:
        pictures.append(media.load(file))
    assert {picture.sha256 for picture in pictures} == {"sha256:" + hashlib.sha256(data).hexdigest()}
    assert len(set(pictures)) == 1


def test_source_names_are_for_people(fixtures: Path) -> None:
    path = fixtures / "plain.png"
    data = path.read_bytes()
    assert media.load(path).source == str(path)
    assert media.load(data).source == "<bytes>"
    assert media.load(Image.new("RGB", (2, 2))).source == "<PIL.Image>"
    assert media.load(np.zeros((2, 2, 3), np.uint8)).source == "<array>"
    assert media.load(f"data:image/png;base64,{base64.b64encode(data).decode()}").source == "data:image/png"
    assert len(repr(media.load(path))) < 400


def test_arrays_and_images_of_the_same_pixels_are_the_same_picture(noise) -> None:
    image = noise(20, 10)
    array = np.asarray(image)
    same = [image, array, array.astype(np.float64) / 255, array.astype(np.float32) / 255, image.copy()]
    assert len({media.load(source).sha256 for source in same}) == 1
    grey = array[..., 0]
    assert media.load(grey) == media.load(grey[..., None]) == media.load(Image.fromarray(grey))
    assert media.load(np.dstack([array, np.zeros((10, 20), np.uint8)])).rgb().getextrema() == ((255, 255),) * 3
    assert media.load(array[::-1, ::-1]).rgb().tobytes() == image.rotate(180).tobytes()


def test_what_changes_the_pixels_of_an_image_changes_its_hash(noise) -> None:
    image = noise(20, 10)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    palette = image.quantize(8)
    other_palette = palette.copy()
    other_palette.putpalette(palette.getpalette()[::-1])
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    reshaped = Image.frombytes("RGB", (10, 20), image.tobytes())
    other_mode = Image.frombytes("HSV", image.size, image.tobytes())
    variants = [image, turned, palette, other_palette, see_through, reshaped, other_mode, image.convert("L")]
    assert len({media.load(variant).sha256 for variant in variants}) == len(variants)


def test_a_picture_does_not_follow_later_changes_of_its_image(noise) -> None:
    image = noise(20, 10)
    picture = media.load(image)
    before = picture.rgb().tobytes()
    image.paste((0, 0, 0), (0, 0, 20, 10))
    picture.rgb().paste((0, 0, 0), (0, 0, 20, 10))
    assert picture.rgb().tobytes() == before


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((2, 2), np.int64),
        np.full((2, 2), 1.5),
        np.full((2, 2), np.nan),
        np.zeros((2, 2), complex),
        np.array([["a"]]),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array: np.ndarray) -> None:
    with pytest.raises(MediaError, match="array"):
        media.load(array)


def test_larger_pictures_shrink_to_the_budget_and_keep_their_aspect(noise, encoded) -> None:
    policy = MediaPolicy(max_pixels=10_000)
    image = noise(400, 200)
    for source in (image, np.asarray(image), *(encoded(image, form) for form in ("PNG", "JPEG", "WEBP", "TIFF"))):
        picture = media.load(source, policy)
        assert (picture.width, picture.height) == (141, 70)
        assert picture.rgb().size == (141, 70)
        assert not picture.untouched
    exact = media.load(encoded(image, "PNG"), MediaPolicy(max_pixels=80_000))
    assert exact.untouched


def test_shrinking_by_the_jpeg_decoder_shows_the_same_picture(encoded) -> None:
    stripes = np.zeros((1200, 1600, 3), np.uint8)
    stripes[:, (np.arange(1600) // 24) % 2 == 1] = (250, 200, 150)
    image = Image.fromarray(stripes)
    picture = media.load(encoded(image, "JPEG", quality=95, subsampling=0), MediaPolicy(max_pixels=200 * 150))
    expected = np.asarray(image.resize((picture.width, picture.height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(picture.rgb()) - expected).mean() <= 4


def test_a_picture_of_encoded_bytes_keeps_no_pixels_after_their_use(fixtures: Path) -> None:
    def images() -> int:
        gc.collect()
        # By type(): isinstance() asks each object for its class, and some warn when they are asked anything.
        return sum(1 for held in gc.get_objects() if issubclass(type(held), Image.Image))

    paths = [fixtures / name for name in ("plain.jpg", "exif_6.jpg", "grey.png")]
    before = images()
    kept = [media.load(path) for path in paths]
    assert images() == before
    for use in (Picture.rgb, Picture.data_url):
        pictures = [media.load(path, decode=False).decoded() for path in paths]
        assert images() == before + len(paths)
        for picture in pictures:
            use(picture)
        kept += pictures
        assert images() == before


@given(st.integers(1, 60_000), st.integers(1, 60_000), st.integers(1, 5_000_000))
def test_the_budget_holds_and_the_aspect_stays(width: int, height: int, most: int) -> None:
    new_width, new_height = budget(width, height, most)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert new_width * new_height <= most
    assert budget(height, width, most) == (new_height, new_width)
    if min(new_width, new_height) > 1:
        error = abs(new_width * height - new_height * width)
        assert error <= max(width, height) + 1e-6 * width * height


def test_fit_and_thumbnail_are_smaller_copies_of_the_same_source(noise, encoded) -> None:
    picture = media.load(encoded(noise(300, 100), "PNG"))
    smaller = picture.fit(7500)
    assert (smaller.width, smaller.height) == (150, 50)
    assert smaller.rgb().size == (150, 50)
    assert smaller.sha256 == picture.sha256
    assert smaller != picture
    assert picture.fit(30_000) is picture
    thumbnail = picture.thumbnail(60)
    assert (thumbnail.width, thumbnail.height, thumbnail.rgb().size) == (60, 20, (60, 20))
    assert thumbnail.data_url().startswith("data:image/jpeg;base64,")
    assert picture.thumbnail(300) is picture
    assert media.load(picture, MediaPolicy(max_pixels=7500)) == smaller
    assert media.load(picture) is picture


def test_data_url_holds_the_data(fixtures: Path) -> None:
    picture = media.load(fixtures / "lossy.webp")
    head, _, body = picture.data_url().partition(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(body) == picture.data


def test_a_picture_survives_pickling_and_copying(fixtures: Path) -> None:
    for name in ("plain.jpg", "exif_6.jpg"):
        picture = media.load(fixtures / name, decode=False)
        for twin in (pickle.loads(pickle.dumps(picture)), copy.copy(picture), copy.deepcopy(picture)):
            assert twin == picture
            assert hash(twin) == hash(picture)
            assert (twin.data, twin.media_type, twin.source) == (picture.data, picture.media_type, picture.source)
            assert twin.rgb().tobytes() == picture.rgb().tobytes()


def test_a_picture_can_be_made_from_its_fields_and_not_be_changed(fixtures: Path) -> None:
    data = (fixtures / "plain.png").read_bytes()
    picture = Picture("sha256:0", 48, 32, data, "image/png", "mine", untouched=True)
    assert picture.rgb().size == (48, 32)
    assert picture.decoded() is picture
    with pytest.raises(AttributeError):
        picture.width = 3
    with pytest.raises(AttributeError, match="no attribute"):
        _ = picture.colour


def test_without_decode_a_broken_file_is_met_when_its_pixels_are(fixtures: Path) -> None:
    cut = (fixtures / "plain.jpg").read_bytes()[:-60]
    for use in (Picture.rgb, Picture.data_url, Picture.decoded, lambda picture: picture.data):
        picture = media.load(cut, decode=False)
        assert (picture.width, picture.height) == (48, 32)
        with pytest.raises(MediaError, match="cut short"):
            use(picture)
    with pytest.raises(MediaError, match="cut short"):
        anyio.run(media.aready, media.load(cut, decode=False))


def test_without_decode_the_picture_is_the_same(fixtures: Path) -> None:
    for path in sorted(fixtures.glob("*.*g")):
        late, early = media.load(path, decode=False), media.load(path)
        assert late == early
        assert (late.untouched, late.media_type, late.data) == (early.untouched, early.media_type, early.data)
        assert late.rgb().tobytes() == early.rgb().tobytes()


def test_threads_may_share_a_picture(fixtures: Path) -> None:
    picture = media.load(fixtures / "exif_6.jpg", decode=False)
    seen: list[tuple[bytes, bytes]] = []
    threads = [threading.Thread(target=lambda: seen.append((picture.data, picture.rgb().tobytes()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_load_works_inside_a_running_loop_and_aload_on_both_loops(site) -> None:
    policy = MediaPolicy(allowed_private=("127.0.0.1",))

    async def main() -> None:
        assert media.load(site.url(), policy) == await media.aload(site.url(), policy)

    anyio.run(main)
    if importlib.util.find_spec("trio") is not None:
        anyio.run(main, backend="trio")


def test_many_at_once_are_decoded_in_a_bounded_number_of_threads(noise, encoded) -> None:
    data = [encoded(noise(64 + n, 64), "PNG") for n in range(40)]
    before = threading.active_count()
    most = 0

    async def one(blob: bytes) -> None:
        nonlocal most
        await media.aload(blob)
        most = max(most, threading.active_count() - before)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for blob in data:
                group.start_soon(one, blob)

    anyio.run(main)
    assert most <= max(2, os.cpu_count() or 2) + 1


def test_importing_the_gate_loads_no_decoder_and_no_http_client() -> None:
    code = "import sys, qvl.media; print([m for m in ('PIL', 'numpy', 'httpx', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
