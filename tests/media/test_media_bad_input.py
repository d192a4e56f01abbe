"""Whatever is handed in that is no picture: one MediaError, on one line, that says what it is and the way out."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl import media
from qvl.errors import ConfigError, MediaError
from qvl.media.policy import MediaPolicy

FIXTURES = Path(__file__).parent / "fixtures"


def refusal(source: object, policy: MediaPolicy = media.DEFAULT_POLICY) -> MediaError:
    with pytest.raises(MediaError) as caught:
        media.load(source, policy)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 400
    assert caught.value.hint
    assert len(str(caught.value)) < 500
    return caught.value


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header announces a size and whose body is a short zlib stream."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\x00" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_missing_file() -> None:
    error = refusal("no/such/shoe.png")
    assert "no such file: no/such/shoe.png" in str(error)
    assert "folder no/such does not exist" in str(error)
    assert refusal("shoe.png").code == "invalid_image"


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in str(refusal(tmp_path))


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert "empty.png is empty" in str(refusal(tmp_path / "empty.png"))
    assert "is empty" in str(refusal(b""))
    assert "is empty" in str(refusal(io.BytesIO()))


@pytest.mark.parametrize("name", [p.name for p in sorted(FIXTURES.iterdir()) if p.suffix not in (".gif", ".tif")])
def test_truncated_pictures(name: str) -> None:
    data = (FIXTURES / name).read_bytes()
    data = data[: data.rindex(b"IDAT") + 8] if name.endswith(".png") else data[: len(data) * 8 // 10]
    if name == "two_in_one.jpg":
        data = data[: len(data) * 4 // 10]
    assert refusal(data).code == "image_decode_failed"


def test_truncated_picture_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes((FIXTURES / "plain.jpg").read_bytes()[:-60])
    error = refusal(path)
    assert "half.jpg: the JPEG picture is cut short or broken" in str(error)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"hello, I am a letter\n", "starts like text"),
        ("schöne Grüße 你好".encode(), "starts like text"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; render it to PNG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', "an SVG drawing; render it to PNG"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"8BPS\x00\x01", "a Photoshop document"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08", "data of an unknown kind"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(head: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "shoe.png"
    path.write_bytes(head)
    error = refusal(path)
    assert f"shoe.png is not a picture: it starts like {words.removeprefix('starts like ')}" in str(error)
    assert error.code == "image_decode_failed"


def test_a_png_bomb_is_refused_by_its_header() -> None:
    error = refusal(png_of_size(30_000, 30_000))
    assert "30000 x 30000 pixels are more than the limit" in str(error)
    assert error.code == "image_too_large"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_limit_on_source_pixels_is_the_policys_own(form: str, encoded) -> None:
    data = encoded(Image.new("RGB", (200, 100)), form)
    assert media.load(data, MediaPolicy(max_source_pixels=20_000)).width == 200
    assert refusal(data, MediaPolicy(max_source_pixels=19_999)).code == "image_too_large"
    assert refusal(Image.new("RGB", (200, 100)), MediaPolicy(max_source_pixels=19_999)).code == "image_too_large"


def test_a_large_picture_within_the_limit_raises_no_warning(monkeypatch: pytest.MonkeyPatch, encoded) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    data = encoded(Image.new("RGB", (100, 100)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert media.load(data).rgb().size == (100, 100)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (20_000, 99)])
def test_strips_are_refused(size: tuple[int, int], encoded) -> None:
    image = Image.new("RGB", size)
    for source in (image, np.asarray(image), encoded(image, "PNG")):
        assert "aspect ratio above 200" in str(refusal(source))
    assert media.load(Image.new("RGB", (200, 1))).height == 1


def test_the_limit_on_bytes_holds_for_every_way_in(tmp_path: Path) -> None:
    data = (FIXTURES / "plain.png").read_bytes()
    path = tmp_path / "shoe.png"
    path.write_bytes(data)
    url = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    policy = MediaPolicy(max_bytes=len(data) - 1)
    urls = (url, "data:image/png;base64," + base64.b64encode(data).decode())
    for source in (data, path, str(path), io.BytesIO(data), *urls):
        assert refusal(source, policy).code == "image_too_large"
        assert media.load(source if not hasattr(source, "seek") else io.BytesIO(data), MediaPolicy(max_bytes=len(data)))


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tif"])
def test_the_limit_on_frames(name: str) -> None:
    frames = 2 if name == "pages.tif" else 3
    assert media.load(FIXTURES / name, MediaPolicy(max_frames=frames))
    assert "frames" in str(refusal(FIXTURES / name, MediaPolicy(max_frames=frames - 1)))


def test_frames_are_not_walked_beyond_the_limit() -> None:
    still = (FIXTURES / "plain.gif").read_bytes()
    frame = b"\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02\x44\x01\x00"
    assert "frames" in str(refusal(still[:-1] + frame * 1_000_000 + b";"))
    looping = bytearray((FIXTURES / "plain.tif").read_bytes())
    at = struct.unpack("<I", looping[4:8])[0]
    entries = struct.unpack("<H", looping[at : at + 2])[0]
    struct.pack_into("<I", looping, at + 2 + 12 * entries, at)
    assert "frames" in str(refusal(bytes(looping)))


@pytest.mark.parametrize("url", ["ftp://example.org/a.png", "gopher://x/1", "s3://bucket/a.png", "javascript://%0a1"])
def test_unknown_schemes_are_refused(url: str) -> None:
    error = refusal(url)
    assert f"unsupported URL scheme {url.partition(':')[0]}:" in str(error)
    assert error.code == "image_url_blocked"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:text/html,<b>hi</b>", "text/html is not a picture"),
        ("data:text/html;base64,PGI+", "text/html is not a picture"),
        ("DATA:TEXT/HTML;base64,PGI+", "text/html is not a picture"),
        ("data:image/png;base64", "needs a comma"),
        ("data:image/png;base64,@@@@", "base64 of a data: URL is broken"),
        ("data:image/png;base64,A", "base64 of a data: URL is broken"),
        ("data:image/png;base64,ÿÿÿÿ", "base64 of a data: URL is broken"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/svg+xml,<svg/>", "an SVG drawing"),
    ],
)
def test_broken_data_urls(url: str, words: str) -> None:
    assert words in str(refusal(url))


@pytest.mark.parametrize("kind", ["binary/octet-stream", "application/octet-stream", "text/plain", "", "image/jpg"])
@pytest.mark.parametrize("more", ["", ";charset=utf-8", ";charset=binary;name=a.png"])
def test_the_first_bytes_of_a_data_url_decide_and_not_its_label(kind: str, more: str) -> None:
    data = (FIXTURES / "plain.png").read_bytes()
    packed = base64.b64encode(data).decode()
    spread = "\n ".join(packed[at : at + 76] for at in range(0, len(packed), 76))
    safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for payload in (packed, spread, safe):
        assert media.load(f"data:{kind}{more};base64,{payload}").data == data


@pytest.mark.parametrize("text", ["", "   ", "a\x00b.png", "x" * 5000, "file://elsewhere/a.png", "file://[/a.png"])
def test_text_that_names_no_file(text: str) -> None:
    refusal(text)


def test_a_file_url_of_another_host_is_not_read_from_this_one() -> None:
    url = (FIXTURES / "plain.png").as_uri()
    assert media.load(url) == media.load(url.replace("file://", "file://localhost")) == media.load(url[:5] + url[7:])
    assert "names the host 'elsewhere'" in str(refusal(url.replace("file://", "file://elsewhere")))


def test_bare_base64_is_told_from_a_path() -> None:
    assert "base64, not a path" in str(refusal("iVBORw0KGgo" + "A" * 600))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in str(refusal(tmp_path / "pipe.png"))
    assert "not a regular file" in str(refusal("/dev/null"))


@pytest.mark.parametrize("source", [None, 5, object(), ["a.png"], {"url": "x"}, True])
def test_what_is_no_source_at_all(source: object) -> None:
    assert "is not a picture" in str(refusal(source))


def test_file_objects_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with (tmp_path / "a.txt").open() as text:
        assert "mode 'rb'" in str(refusal(text))
    assert "cannot be read" in str(refusal(text))


def test_broken_pil_image_is_a_media_error() -> None:
    with Image.open(io.BytesIO((FIXTURES / "plain.jpg").read_bytes()[:-60])) as image:
        assert refusal(image).code == "image_decode_failed"


@pytest.mark.parametrize("source", ["shoe.png", "/etc/hostname", "file:///etc/hostname", "FILE:/etc/hostname", "~/a"])
def test_a_policy_without_files_opens_none(source: str) -> None:
    policy = MediaPolicy(allow_files=False)
    error = refusal(source, policy)
    assert "paths are not accepted" in str(error)
    assert error.code == "image_url_blocked"
    assert "paths are not accepted" in str(refusal(Path(source), policy))
    assert media.load((FIXTURES / "plain.png").read_bytes(), policy)


def test_only_allowed_formats_are_decoded() -> None:
    policy = MediaPolicy(formats=frozenset({"png", "jpg"}))
    assert policy.formats == {"PNG", "JPEG"}
    assert media.load(FIXTURES / "plain.png", policy)
    assert media.load(FIXTURES / "plain.jpg", policy)
    assert "starts like GIF" in str(refusal(FIXTURES / "plain.gif", policy))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert "not a picture" in str(refusal(eps))


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 0},
        {"max_bytes": -1},
        {"max_source_pixels": 0},
        {"max_frames": 0},
        {"max_aspect": 0.5},
        {"timeout": 0},
        {"max_redirects": -1},
        {"formats": frozenset()},
        {"formats": frozenset({"EPS"})},
        {"formats": "PNG"},
        {"allowed_domains": "example.org"},
        {"allowed_domains": ("https://example.org",)},
        {"allowed_domains": ("",)},
        {"allowed_private": ("10.0.0.0/99",)},
    ],
)
def test_a_policy_that_cannot_work_is_a_config_error(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        MediaPolicy(**options)
    assert caught.value.param in options


def never_another_error(data: bytes) -> None:
    with warnings.catch_warnings(), contextlib.suppress(MediaError):
        warnings.simplefilter("ignore")
        picture = media.load(data)
        assert picture.rgb().size == (picture.width, picture.height)


HEADS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    b"GIF89a",
    b"BM",
]
HEADS += [
    b"II*\x00\x08\x00\x00\x00",
    b"MM\x00*\x00\x00\x00\x08",
    b"II+\x00\x08\x00\x00\x00",
    b"\x00\x00\x00\x1cftypavif",
]


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(HEADS), st.binary(max_size=400))
def test_random_bytes_raise_media_errors_only(head: bytes, tail: bytes) -> None:
    never_another_error(head + tail)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_pictures_raise_media_errors_only(draw: st.DataObject) -> None:
    path = draw.draw(st.sampled_from(sorted(FIXTURES.iterdir())))
    data = bytearray(path.read_bytes())
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(len(data) // 2, len(data)))
    never_another_error(bytes(data[:cut]))


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.text(max_size=80), st.text(max_size=60).map("data:".__add__), st.text(max_size=60).map("file:".__add__)
    )
)
@example("~\x00")
def test_random_text_raises_media_errors_only(text: str) -> None:
    with pytest.raises(MediaError):
        media.load(text)
