"""The media gate: turns any source of a picture into one canonical RGB `Picture`.

It serves the SDK and the server: EXIF orientation applied, alpha composited on white, palettes, 16-bit grey and CMYK
to RGB, first frame of an animation, at most `max_pixels` with the aspect ratio kept, and limits on bytes, pixels,
frames, time and formats. Every failure is a `MediaError` of one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio.from_thread

from qvl.media import base64_codec, image_header, sources
from qvl.media.base64_codec import Base64Picture
from qvl.media.decode_threads import in_worker
from qvl.media.digest_cache import DigestCache, Encoded
from qvl.media.picture import LazyPixels, Picture, PictureSource, _deferred
from qvl.media.policy import DEFAULT_POLICY, MediaPolicy, canonical_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qvl.media.fetch import Resolver
    from qvl.media.image_header import Header


# Encoded bytes, or characters of base64, that are decoded and hashed in less time than a change of thread takes.
SMALL: Final = 64 * 1024
# Checking all codes of one so small takes less time than that, too.
TINY: Final = 16 * 1024
TINY_PIXELS: Final = 256 * 256
# The same for those that are decoded by pybase64, compared and searched for markers alone.
MEDIUM: Final = 4 * 1024 * 1024


def load(
    source: PictureSource,
    policy: MediaPolicy = DEFAULT_POLICY,
    *,
    decode: bool = True,
    digests: DigestCache | None = None,
) -> Picture:
    """Return `source` as a checked Picture. A URL is fetched in a thread of its own; prefer `aload` in async code.

    Args:
        source: a path, a `file:`, `data:`, `http:` or `https:` URL, encoded bytes, a binary file object, a PIL image,
            an array of numpy, jax or tensorflow (HxW, HxWx1, HxWx3, HxWx4; uint8 or floats from 0 to 1), a torch tensor
            (the same, or CxHxW), or a Picture.
        policy: the limits.
        decode: False reads header and hash only; a broken file then fails when its pixels are first used.
        digests: cache of hashes of recent pictures.

    Raises:
        MediaError: the picture is missing, broken, refused, or breaks a limit.
    """
    url = _web_url(source)
    if url is None:
        return _load_local(source, policy, decode, digests)
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(_load_url, url, policy, decode, digests, None)


async def aload(
    source: PictureSource,
    policy: MediaPolicy = DEFAULT_POLICY,
    *,
    decode: bool = True,
    digests: DigestCache | None = None,
    resolver: Resolver | None = None,
) -> Picture:
    """Return `source` as `load` does, for async code: fetches on the event loop, decodes in a limited set of threads.

    `resolver` replaces the system's name resolution; the addresses it gives are checked like any other.
    """
    url = _web_url(source)
    if url is not None:
        return await _load_url(url, policy, decode, digests, resolver)
    if not decode and not isinstance(source, Picture) and _is_at_once(source, policy, digests):
        # Read once, whether it is known or not: the worker would decode the megabytes of base64 again.
        data, name = sources.read(source, policy)
        if (now := _now(data, name, source, policy, digests)) is not None:
            return now
        text = _text_of(source)
        return await in_worker(lambda: _from_bytes(data, policy, name, digests, text))
    if not decode and isinstance(source, Picture) and (now := load_now(source, policy)) is not None:
        return now
    picture = await in_worker(lambda: _load_local(source, policy, False, digests))
    return await _verified(picture) if decode else picture


def load_now(source: PictureSource, policy: MediaPolicy, *, digests: DigestCache | None = None) -> Picture | None:
    """Return `source` as a Picture, not decoded, if that is fast enough for an event loop, else None.

    Raises:
        MediaError: as `load`.
    """
    if isinstance(source, Picture):
        return source.under(policy) if _is_small(source, policy) else None
    if not _is_at_once(source, policy, digests):
        return None
    return _now(*sources.read(source, policy), source, policy, digests)


def _is_at_once(source: object, policy: MediaPolicy, digests: DigestCache | None) -> bool:
    """True if an event loop can read the bytes of `source`."""
    return _is_small(source, policy) or (digests is not None and _is_medium(source))


def _now(data: bytes, name: str, source: object, policy: MediaPolicy, digests: DigestCache | None) -> Picture | None:
    """Return the Picture of the bytes read from `source`; None if probing them takes too long for a loop."""
    header = image_header.probe_at_once(data, policy, name)
    return None if header is None else _probed(data, header, policy, name, digests, _text_of(source))


def _text_of(source: object) -> memoryview | None:
    """Return the base64 of `source` that can be passed on as it is."""
    if not isinstance(source, Base64Picture) or not base64_codec.is_canonical(source.text, source.data):
        return None
    return source.text


async def _verified(picture: Picture) -> Picture:
    """Return itself with its bytes verified; large pictures are verified one at a time."""
    lazy = picture._pixels
    if lazy is not None:
        await in_worker(lambda: lazy.verify(keep=False), large=lazy.large)
    return picture


async def hash_pictures(pictures: Sequence[Picture]) -> None:
    """Compute the hashes of `pictures`; of large ones in a thread."""
    if not all(picture.hashed for picture in pictures):
        await in_worker(lambda: [picture.sha256 for picture in pictures])


def is_ready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> bool:
    """True if the picture is as `aready` returns it; its bytes are verified for that where that is fast.

    Raises:
        MediaError: the source bytes are cut short or broken.
    """
    fits = max_pixels is None or picture.width * picture.height <= max_pixels
    return fits and not pixels and picture.checked_at_once()


async def aready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """Return a picture loaded with `decode=False` ready for a backend: decoded, or only verified without `pixels`.

    `max_pixels` is a smaller budget than the policy's, as in `Picture.fit`.

    Raises:
        MediaError: the source bytes are cut short or broken.
    """
    if is_ready(picture, max_pixels, pixels=pixels):
        return picture
    return await readied(picture, max_pixels, pixels=pixels)


async def readied(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """Return the picture as `aready` does, where `is_ready` is False."""
    return await in_worker(lambda: ready(picture, max_pixels, pixels=pixels), large=picture.large)


def ready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """Return the picture as `aready` does, computed in this thread."""
    small = picture if max_pixels is None else picture.fit(max_pixels)
    return small.decoded() if pixels else small.checked()


def is_remote(source: PictureSource) -> bool:
    """True if `source` is a URL that has to be fetched."""
    return _web_url(source) is not None


async def fetch(url: str, policy: MediaPolicy, *, resolver: Resolver | None = None) -> tuple[bytes, str]:
    """Return (the bytes at an http(s) URL, its short display name), whatever they are.

    Raises:
        MediaError: the URL is refused, or cannot be fetched within the limits.
    """
    from qvl.media.fetch import Fetcher, public_name

    url = url.strip()
    fetcher = Fetcher(policy) if resolver is None else Fetcher(policy, resolver=resolver)
    return await fetcher.fetch(url), public_name(url)


async def afrom_bytes(
    data: bytes, name: str, policy: MediaPolicy, *, decode: bool = True, digests: DigestCache | None = None
) -> Picture:
    """Return encoded `data` as a Picture of that name, as `aload` does.

    Raises:
        MediaError: as `load`.
    """
    picture = await in_worker(lambda: _from_bytes(data, policy, name, digests))
    return await _verified(picture) if decode else picture


async def _load_url(
    url: str, policy: MediaPolicy, decode: bool, digests: DigestCache | None, resolver: Resolver | None
) -> Picture:
    data, name = await fetch(url, policy, resolver=resolver)
    return await afrom_bytes(data, name, policy, decode=decode, digests=digests)


def _web_url(source: object) -> str | None:
    if isinstance(source, str):
        text = source.strip()
        if text[:8].lower().startswith(("http://", "https://")):
            return text
    return None


def _is_small(source: object, policy: MediaPolicy) -> bool:
    """True if `source` is in memory and small enough to hash on an event loop."""
    if isinstance(source, Picture):
        return canonical_size(source.width, source.height, policy)[:2] == (source.width, source.height)
    if isinstance(source, str):
        return len(source) <= SMALL and source.lstrip()[:5].lower() == "data:"
    return isinstance(source, (bytes, bytearray, memoryview)) and len(source) <= SMALL


def _is_medium(source: object) -> bool:
    """True if `source` is a data: URL that an event loop can decode, or was decoded before."""
    return isinstance(source, Base64Picture) or (
        isinstance(source, str)
        and base64_codec.FAST
        and len(source) <= MEDIUM
        and source[:5] == "data:"
        and source.find(";base64,", 5, 64) > 0
    )


def _load_local(source: PictureSource, policy: MediaPolicy, decode: bool, digests: DigestCache | None) -> Picture:
    """Return a Picture of any source but an http(s) URL."""
    if isinstance(source, Picture):
        return source.under(policy)
    from PIL import Image

    from qvl.media import pixels

    if isinstance(source, Image.Image):
        return _from_image(source, policy, "<PIL.Image>", digests)
    if (array := pixels.array_of(source)) is not None:
        return _from_image(pixels.from_array(array), policy, "<array>", digests)
    data, name = sources.read(source, policy)
    picture = _from_bytes(data, policy, name, digests, _text_of(source))
    if decode and picture._pixels is not None:
        picture._pixels.verify(keep=False)
    return picture


def _from_image(image: Image.Image, policy: MediaPolicy, name: str, digests: DigestCache | None) -> Picture:
    from qvl.media import pixels

    rgb, original, sized = pixels.canonical(image, policy, name)
    lazy = LazyPixels(rgb=rgb.copy() if rgb is image else rgb)
    return _deferred(pixels.fingerprint(image, digests), rgb.size, name, lazy, original, untouched=False, sized=sized)


def _from_bytes(
    data: bytes, policy: MediaPolicy, name: str, digests: DigestCache | None, text: memoryview | None = None
) -> Picture:
    return _probed(data, image_header.probe(data, policy, name), policy, name, digests, text)


def _probed(
    data: bytes, header: Header, policy: MediaPolicy, name: str, digests: DigestCache | None, text: memoryview | None
) -> Picture:
    from qvl.media import pixels

    encoded = Encoded(data) if digests is None else digests.encoded(data)
    # Not `data`, which is a second copy of equal bytes in the cache.
    data = encoded.data
    tiny = len(data) <= TINY and header.width * header.height <= TINY_PIXELS
    lazy = LazyPixels(
        encoded=encoded,
        decode=lambda: pixels.decode(data, header, policy, name),
        check=(lambda: pixels.check(data, header, policy, name)) if header.plain else None,
        at_once=None if tiny else lambda: len(data) <= MEDIUM and pixels.surely_whole(data, header, policy),
        large=header.large,
        text=text,
    )
    size = (header.width, header.height)
    return _deferred(
        None, size, name, lazy, header.original, header.media_type, untouched=header.plain, sized=header.sized
    )
