"""Remembering pictures of late saves work and never changes an answer."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl import media
from qvl.errors import MediaError
from qvl.media.digest_cache import SAMPLES, DigestCache
from qvl.media.policy import MediaPolicy

FIXTURES = Path(__file__).parent / "fixtures"


def test_equal_bytes_are_hashed_once() -> None:
    digests = DigestCache()
    first = digests.encoded(bytes(100_000))
    assert digests.encoded(bytes(100_000)) is first
    assert first.sha256 == f"sha256:{hashlib.sha256(bytes(100_000)).hexdigest()}"


@given(st.data())
def test_one_other_byte_is_another_picture(draw: st.DataObject) -> None:
    size = draw.draw(st.sampled_from([1, 2, SAMPLES, SAMPLES + 1, 5000, 70_001]))
    data = bytearray(size)
    digests = DigestCache()
    digests.encoded(bytes(data))
    data[draw.draw(st.integers(0, size - 1))] = draw.draw(st.integers(1, 255))
    assert digests.encoded(bytes(data)).sha256 == f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_no_more_is_held_than_allowed_and_the_latest_stay() -> None:
    digests = DigestCache(max_bytes=40)
    made = [digests.encoded(bytes([number]) * 10) for number in range(4)]
    assert digests.encoded(bytes([0]) * 10) is made[0]
    digests.encoded(bytes([9]) * 10)
    assert digests.encoded(bytes([0]) * 10) is made[0]
    assert digests.encoded(bytes([1]) * 10) is not made[1]
    large = digests.encoded(bytes(21))
    assert digests.encoded(bytes(21)) is not large


def test_what_is_forgotten_is_hashed_again() -> None:
    digests = DigestCache()
    first = digests.encoded(b"abc")
    digests.clear()
    assert digests.encoded(b"abc") is not first


def test_threads_may_share_it() -> None:
    digests = DigestCache(max_bytes=4000)
    wrong: list[bytes] = []

    def work() -> None:
        for number in range(300):
            data = bytes([number % 7]) * (900 + number % 5)
            if digests.encoded(data).sha256 != f"sha256:{hashlib.sha256(data).hexdigest()}":
                wrong.append(data)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["plain.png", "plain.jpg", "exif_6.jpg", "rgba_hidden.png", "animated.gif"])
def test_a_picture_seen_before_is_the_same_picture(name: str) -> None:
    digests, data = DigestCache(), (FIXTURES / name).read_bytes()
    alone = media.load(data)
    for _ in range(3):
        again = media.load(bytes(bytearray(data)), decode=False, digests=digests).decoded()
        assert again == alone
        assert (again.data, again.media_type, again.untouched) == (alone.data, alone.media_type, alone.untouched)
        assert again.rgb().tobytes() == alone.rgb().tobytes()
        other = MediaPolicy(max_pixels=1024)
        assert media.load(data, other, digests=digests) == media.load(data, other)


def test_that_it_is_whole_is_remembered_and_that_it_is_broken_found_again() -> None:
    digests, data = DigestCache(), (FIXTURES / "plain.png").read_bytes()
    assert not media.load(data, decode=False, digests=digests).at_hand
    media.load(data, digests=digests)
    assert media.load(data, decode=False, digests=digests).at_hand
    for _ in range(2):
        with pytest.raises(MediaError, match="cut short"):
            media.load(data[: data.rindex(b"IDAT") + 8], digests=digests)


def test_a_policy_holds_also_for_what_was_seen_under_another() -> None:
    digests, data = DigestCache(), (FIXTURES / "plain.png").read_bytes()
    media.load(data, digests=digests)
    with pytest.raises(MediaError, match="limit"):
        media.load(data, MediaPolicy(max_source_pixels=10), digests=digests)
    with pytest.raises(MediaError, match="not a picture"):
        media.load(data, MediaPolicy(formats=frozenset({"JPEG"})), digests=digests)


def test_an_image_seen_before_is_the_same_picture_and_one_changed_in_place_is_not() -> None:
    digests, image = DigestCache(), Image.effect_noise((60, 40), 90).convert("RGB")
    first = media.load(image, digests=digests)
    assert media.load(image, digests=digests) == first == media.load(image)
    image.putpixel((7, 9), (1, 2, 3))
    assert media.load(image, digests=digests) == media.load(image) != first
