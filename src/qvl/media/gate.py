"""The media gate: whatever a user calls a picture becomes one canonical RGB `Picture`.

One gate for the SDK and the server: EXIF orientation applied, alpha laid on white, palettes, 16-bit grey and CMYK to
RGB, first frame of an animation, at most `max_pixels` with the aspect ratio kept, and limits on bytes, pixels, frames,
time and formats. Everything that goes wrong is a `MediaError` of one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio.from_thread

from qvl.media.decode_threads import in_worker
from qvl.media.digest_cache import DigestCache, Encoded
from qvl.media.picture import HeldPixels, Picture, PictureSource, _deferred
from qvl.media.policy import DEFAULT_POLICY, MediaPolicy, canonical_size

if TYPE_CHECKING:
    from PIL import Image

    from qvl.media.fetch import Resolver


# Encoded bytes, or characters of base64, that are hashed in less time than a change of thread takes.
SMALL: Final = 64 * 1024


def load(
    source: PictureSource, policy: MediaPolicy = DEFAULT_POLICY, *, decode: bool = True, seen: DigestCache | None = None
) -> Picture:
    """Takes any picture through the gate. A URL is fetched in a thread of its own; prefer `aload` in async code.

    Args:
        source: a path, a `file:`, `data:`, `http:` or `https:` URL, encoded bytes, a binary file object, a PIL image, a
            array of numpy, jax or tensorflow (HxW, HxWx1, HxWx3, HxWx4; uint8 or floats from 0 to 1), a torch tensor
            (the same, or CxHxW), or a Picture.
        policy: the limits.
        decode: False reads header and hash only; whoever first needs the pixels meets a broken file then.
        seen: what was hashed before, to be asked and told.

    Raises:
        MediaError: the picture is missing, broken, refused, or breaks a limit.
    """
    url = _web_url(source)
    if url is None:
        return _load_local(source, policy, decode, seen)
    with anyio.from_thread.start_blocking_portal() as portal:
        return portal.call(_load_url, url, policy, decode, seen, None)


async def aload(
    source: PictureSource,
    policy: MediaPolicy = DEFAULT_POLICY,
    *,
    decode: bool = True,
    seen: DigestCache | None = None,
    resolver: Resolver | None = None,
) -> Picture:
    """`load` for async code: waits on the network in the event loop, works on pixels in a bounded set of threads.

    `resolver` replaces the system's name resolution; the addresses it gives are checked like any other.
    """
    url = _web_url(source)
    if url is not None:
        return await _load_url(url, policy, decode, seen, resolver)
    if not decode and (picture := load_now(source, policy, seen=seen)) is not None:
        return picture
    picture = await in_worker(lambda: _load_local(source, policy, False, seen))
    return await _verified(picture) if decode else picture


def load_now(source: PictureSource, policy: MediaPolicy, *, seen: DigestCache | None = None) -> Picture | None:
    """Return `source` read and hashed if that takes next to nothing, else None.

    Raises:
        MediaError: as `load`.
    """
    if isinstance(source, Picture):
        return source.under(policy) if _is_small(source, policy) else None
    if not _is_small(source, policy):
        return None
    from qvl.media import image_header, sources

    data, name = sources.read(source, policy)
    return _from_bytes(data, policy, name, False, seen) if image_header.is_cheap(data) else None


async def _verified(picture: Picture) -> Picture:
    """Itself, once its bytes were found sound; a large one waits for its turn."""
    held = picture._pixels
    if held is not None:
        await in_worker(lambda: held.verify(keep=False), large=held.large)
    return picture


async def aready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """A picture loaded with `decode=False`, ready for a backend: decoded, or only checked where it wants no `pixels`.

    `max_pixels` is a smaller budget than the policy's, as in `Picture.fit`.

    Raises:
        MediaError: the source bytes are cut short or broken.
    """
    if picture.at_hand and not pixels and (max_pixels is None or picture.width * picture.height <= max_pixels):
        return picture
    return await in_worker(lambda: ready(picture, max_pixels, pixels=pixels), large=picture.large)


def ready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """Return the picture of `aready`, made in this thread."""
    small = picture if max_pixels is None else picture.fit(max_pixels)
    return small.decoded() if pixels else small.checked()


def is_remote(source: PictureSource) -> bool:
    """True if `source` is an address that has to be fetched from."""
    return _web_url(source) is not None


async def _load_url(
    url: str, policy: MediaPolicy, decode: bool, seen: DigestCache | None, resolver: Resolver | None
) -> Picture:
    from qvl.media.fetch import Fetcher, public_name

    fetcher = Fetcher(policy) if resolver is None else Fetcher(policy, resolver=resolver)
    data = await fetcher.fetch(url)
    picture = await in_worker(lambda: _from_bytes(data, policy, public_name(url), False, seen))
    return await _verified(picture) if decode else picture


def _web_url(source: object) -> str | None:
    if isinstance(source, str):
        text = source.strip()
        if text[:8].lower().startswith(("http://", "https://")):
            return text
    return None


def _is_small(source: object, policy: MediaPolicy) -> bool:
    """Whether it is in memory already, and next to nothing to hash."""
    if isinstance(source, Picture):
        return canonical_size(source.width, source.height, policy)[:2] == (source.width, source.height)
    if isinstance(source, str):
        return len(source) <= SMALL and source.lstrip()[:5].lower() == "data:"
    return isinstance(source, (bytes, bytearray, memoryview)) and len(source) <= SMALL


def _load_local(source: PictureSource, policy: MediaPolicy, decode: bool, seen: DigestCache | None) -> Picture:
    """Everything but http(s)."""
    if isinstance(source, Picture):
        return source.under(policy)
    from PIL import Image

    from qvl.media import pixels, sources

    if isinstance(source, Image.Image):
        return _from_image(source, policy, "<PIL.Image>", seen)
    if (array := pixels.array_of(source)) is not None:
        return _from_image(pixels.from_array(array), policy, "<array>", seen)
    data, name = sources.read(source, policy)
    return _from_bytes(data, policy, name, decode, seen)


def _from_image(image: Image.Image, policy: MediaPolicy, name: str, seen: DigestCache | None) -> Picture:
    from qvl.media import pixels

    rgb, sized = pixels.canonical(image, policy, name)
    held = HeldPixels(rgb=rgb.copy() if rgb is image else rgb)
    return _deferred(pixels.fingerprint(image, seen), rgb.size, name, held, untouched=False, sized=sized)


def _from_bytes(data: bytes, policy: MediaPolicy, name: str, decode: bool, seen: DigestCache | None) -> Picture:
    from qvl.media import image_header, pixels

    header = image_header.probe(data, policy, name)
    encoded = Encoded(data) if seen is None else seen.encoded(data)
    # Not `data`, which is a second copy of what was seen before.
    data = encoded.data
    held = HeldPixels(
        encoded=encoded,
        decode=lambda: pixels.decode(data, header, policy, name),
        check=(lambda: pixels.check(data, header, policy, name)) if header.plain else None,
        large=header.large,
    )
    if decode:
        held.verify(keep=False)
    size = (header.width, header.height)
    return _deferred(encoded.sha256, size, name, held, header.media_type, untouched=header.plain, sized=header.sized)
