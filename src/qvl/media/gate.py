"""The media gate: whatever a user calls a picture becomes one canonical RGB `Picture`.

One gate for the SDK and the server: EXIF orientation applied, alpha laid on white, palettes, 16-bit grey and CMYK to
RGB, first frame of an animation, at most `max_pixels` with the aspect ratio kept, and limits on bytes, pixels, frames,
time and formats. Everything that goes wrong is a `MediaError` of one line.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import os
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias

import anyio.from_thread

from qvl.errors import ConfigError
from qvl.media.decode_threads import in_worker
from qvl.media.digest_cache import Encoded, Seen
from qvl.media.held import HeldPixels
from qvl.media.smart_resize import NO_LIMITS, PixelLimits, budget, canonical_size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from qvl.media.fetch import Resolver

PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any] | Picture"
)

FORMATS: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"})


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """The limits of the gate. Sizes are in bytes or pixels, times in seconds.

    Args:
        max_pixels: budget of the canonical picture; larger ones are made smaller, aspect ratio kept.
        min_pixels: a picture with fewer is made larger by Qwen's smart_resize; 0 leaves it to the model.
        limits: what a request says about the size of one picture, within `max_pixels`.
        max_bytes: largest encoded picture that is read, from a file, a URL or memory.
        max_source_pixels: largest picture that is decoded at all (decompression bombs).
        max_decode_bytes: most memory that decoding one picture may take, estimated from its header. Within the default
            stay, in millions of pixels: 178 as baseline JPEG, 38 as progressive one (26 without subsampling), 67 as RGB
            PNG (26 with alpha), and 16 as RGB WebP.
        max_decode_seconds: most processor time that decoding one picture may take.
        max_frames: most frames of an animation, or pages of a TIFF; only the first is used.
        max_aspect: largest ratio of the long to the short side.
        timeout: for the whole of a fetch, redirects included.
        max_redirects: each hop is checked like the first address.
        formats: Pillow's format names; JPEG includes MPO.
        allow_files: False refuses paths and `file:` URLs, for what arrives in a request to a server.
        allowed_domains: when set, URLs may name these hosts only; `.example.org` means the domain and all below it.
        allowed_private: hosts, addresses or networks (CIDR) that may be fetched from though they are not public.

    Raises:
        ConfigError: a value that cannot work.
    """

    max_pixels: int = 2_621_440
    min_pixels: int = 0
    limits: PixelLimits = NO_LIMITS
    max_bytes: int = 64 * 1024 * 1024
    max_source_pixels: int = 178_956_970
    max_decode_bytes: int = 256 * 1024 * 1024
    max_decode_seconds: float = 10.0
    max_frames: int = 1_000
    max_aspect: float = 200.0
    timeout: float = 20.0
    max_redirects: int = 3
    formats: frozenset[str] = FORMATS
    allow_files: bool = True
    allowed_domains: tuple[str, ...] = ()
    allowed_private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes", "max_source_pixels", "max_decode_bytes", "max_frames", "max_aspect"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        self._check("min_pixels", 0 <= self.min_pixels <= self.max_pixels, f"from 0 to max_pixels, {self.max_pixels}")
        for name in ("timeout", "max_decode_seconds"):
            self._check(name, getattr(self, name) > 0, "above 0, in seconds")
        self._check("max_redirects", self.max_redirects >= 0, "0 or more")
        for name in ("formats", "allowed_domains", "allowed_private"):
            self._check(name, not isinstance(getattr(self, name), str), "a list of strings")
        object.__setattr__(self, "formats", frozenset(form.upper() for form in self.formats))
        known = {"JPG": "JPEG", "MPO": "JPEG", "TIF": "TIFF"}
        object.__setattr__(self, "formats", frozenset(known.get(form, form) for form in self.formats))
        self._check("formats", bool(self.formats) and self.formats <= FORMATS, f"of {', '.join(sorted(FORMATS))}")
        for name in ("allowed_domains", "allowed_private"):
            hosts = tuple(host.strip().rstrip(".").lower() for host in getattr(self, name))
            self._check(name, all(host.strip(".") and "://" not in host for host in hosts), "host names, no URLs")
            object.__setattr__(self, name, hosts)
        for entry in self.allowed_private:
            if "/" in entry:
                self._check("allowed_private", _is_network(entry), "networks as 10.1.0.0/16")

    def with_sizes(self, max_pixels: int | None, min_pixels: int | None) -> MediaPolicy:
        """Itself with the budgets that are given."""
        given = {"max_pixels": max_pixels, "min_pixels": min_pixels}
        named: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
        return replace(self, **named) if named else self

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{name}={getattr(self, name)!r} cannot work", hint=allowed, param=name)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that came through the gate. Equal when the source and the canonical size are equal.

    Safe to share between threads. `data` may be computed (checked, or encoded) when it is first asked for.

    Args:
        sha256: `sha256:` and the hex digest, of the source bytes for encoded pictures, of mode, size and pixels for
            PIL images and arrays.
        width: canonical width in pixels (after EXIF, within the budget).
        height: canonical height in pixels.
        data: encoded canonical picture: the source bytes themselves when every decoder reads them alike (plain 8-bit
            RGB as JPEG, PNG or WebP, one frame, not turned, within the budget), else a lossless PNG.
        media_type: of `data`, as `image/png`.
        source: short name for people: a path, a URL without query and credentials, `<bytes>`, `<PIL.Image>`.
        untouched: whether `data` are the source bytes.
        sized: whether a request set the size, so that the model's own lower limit does not change it again.
    """

    sha256: str
    width: int
    height: int
    data: bytes = field(repr=False, compare=False)
    media_type: str = field(compare=False)
    source: str = field(compare=False)
    untouched: bool = field(compare=False)
    sized: bool = False
    _pixels: HeldPixels | None = field(default=None, repr=False, compare=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            # Reached for `data` alone, whose slot stays empty until the bytes are needed.
            if name == "data" and self._pixels is not None:
                object.__setattr__(self, "data", self._pixels.encoded())
                return self.data
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self) -> tuple[type[Picture], tuple[Any, ...]]:
        # Locks and open images do not pickle; the canonical bytes say everything.
        told = (self.sha256, self.width, self.height, self.data, self.media_type, self.source, self.untouched)
        return Picture, (*told, self.sized)

    def rgb(self) -> Image.Image:
        """The canonical picture, decoded: mode RGB, a fresh copy for the caller.

        Raises:
            MediaError: the source bytes are cut short or broken (only when loaded with `decode=False`).
        """
        if self._pixels is not None:
            return self._pixels.rgb()
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            return image.convert("RGB")

    def data_url(self) -> str:
        """`data` as a `data:` URL with base64."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"

    def thumbnail(self, edge: int = 256) -> Picture:
        """A copy whose longer side is at most `edge` pixels, as JPEG; itself when it is small enough."""
        if max(self.width, self.height) <= edge:
            return self
        from qvl.media import pixels

        scale = edge / max(self.width, self.height)
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        data = pixels.encode_jpeg(pixels.resized(self.rgb(), size))
        return Picture(self.sha256, *size, data, "image/jpeg", self.source, untouched=False)

    def fit(self, max_pixels: int) -> Picture:
        """A smaller copy within `max_pixels`, aspect ratio kept; itself when it fits already."""
        return self._resized(budget(self.width, self.height, max_pixels), self.sized)

    def under(self, policy: MediaPolicy) -> Picture:
        """A copy of the size that `policy` gives it; itself when it has that already."""
        width, height, sized = canonical_size(self.width, self.height, policy)
        return self._resized((width, height), sized or self.sized)

    def _resized(self, size: tuple[int, int], sized: bool) -> Picture:
        from qvl.media import pixels

        if size != (self.width, self.height):
            held = HeldPixels(rgb=pixels.resized(self.rgb(), size))
            return _deferred(self.sha256, size, self.source, held, untouched=False, sized=sized)
        if sized == self.sized:
            return self
        held = self._pixels or HeldPixels(rgb=self.rgb())
        return _deferred(self.sha256, size, self.source, held, self.media_type, untouched=self.untouched, sized=sized)

    def decoded(self) -> Picture:
        """Itself, so that nothing later can fail: decoded, and the next `rgb()` costs nothing, unless the source bytes
        are known to be sound already.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.settle()
        return self

    def checked(self) -> Picture:
        """Itself, after its bytes were found whole, so that whoever is given `data` can decode them.

        For those who pass `data` on: where bytes pass untouched this takes less than decoding them.

        Raises:
            MediaError: the source bytes are cut short or broken.
        """
        if self._pixels is not None:
            self._pixels.verify(keep=True)
        return self

    @property
    def large(self) -> bool:
        """Whether decoding it takes so long or so much memory that it is done one at a time."""
        return self._pixels is not None and self._pixels.large

    @property
    def at_hand(self) -> bool:
        """Whether `data` can be had at once: it is neither to be encoded nor to be checked first."""
        return self._pixels is None or self._pixels.at_hand


def _deferred(
    sha256: str,
    size: tuple[int, int],
    source: str,
    held: HeldPixels,
    media_type: str = "image/png",
    *,
    untouched: bool,
    sized: bool,
) -> Picture:
    """A Picture whose `data` is worked out on first use."""
    picture = object.__new__(Picture)
    for name, value in (
        ("sha256", sha256),
        ("width", size[0]),
        ("height", size[1]),
        ("media_type", media_type),
        ("source", source),
        ("untouched", untouched),
        ("sized", sized),
        ("_pixels", held),
    ):
        object.__setattr__(picture, name, value)
    return picture


DEFAULT_POLICY: Final = MediaPolicy()


# Encoded bytes, or characters of base64, that are hashed in less time than a change of thread takes.
SMALL: Final = 64 * 1024


def load(
    source: PictureSource, policy: MediaPolicy = DEFAULT_POLICY, *, decode: bool = True, seen: Seen | None = None
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
    seen: Seen | None = None,
    resolver: Resolver | None = None,
) -> Picture:
    """`load` for async code: waits on the network in the event loop, works on pixels in a bounded set of threads.

    `resolver` replaces the system's name resolution; the addresses it gives are checked like any other.
    """
    url = _web_url(source)
    if url is not None:
        return await _load_url(url, policy, decode, seen, resolver)
    if not decode and _is_small(source, policy):
        return _load_local(source, policy, decode, seen)
    picture = await in_worker(lambda: _load_local(source, policy, False, seen))
    return await _verified(picture) if decode else picture


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
    if picture.at_hand and not pixels and (max_pixels is None or _fits(picture, max_pixels)):
        return picture
    return await in_worker(lambda: ready(picture, max_pixels, pixels=pixels), large=picture.large)


def ready(picture: Picture, max_pixels: int | None = None, *, pixels: bool = True) -> Picture:
    """As `aready`, in this thread."""
    small = picture if max_pixels is None else picture.fit(max_pixels)
    return small.decoded() if pixels else small.checked()


def is_remote(source: PictureSource) -> bool:
    """Whether `source` is an address that has to be fetched from."""
    return _web_url(source) is not None


async def _load_url(
    url: str, policy: MediaPolicy, decode: bool, seen: Seen | None, resolver: Resolver | None
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
    """Whether it is in memory already, and next to nothing to read and to hash."""
    if isinstance(source, Picture):
        return canonical_size(source.width, source.height, policy)[:2] == (source.width, source.height)
    if isinstance(source, str):
        return len(source) <= SMALL and source.lstrip()[:5].lower() == "data:"
    return isinstance(source, (bytes, bytearray, memoryview)) and len(source) <= SMALL


def _fits(picture: Picture, max_pixels: int) -> bool:
    return picture.width * picture.height <= max_pixels


def _load_local(source: Any, policy: MediaPolicy, decode: bool, seen: Seen | None) -> Picture:
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


def _from_image(image: Image.Image, policy: MediaPolicy, name: str, seen: Seen | None) -> Picture:
    from qvl.media import pixels

    rgb, sized = pixels.canonical(image, policy, name)
    held = HeldPixels(rgb=rgb.copy() if rgb is image else rgb)
    return _deferred(pixels.fingerprint(image, seen), rgb.size, name, held, untouched=False, sized=sized)


def _from_bytes(data: bytes, policy: MediaPolicy, name: str, decode: bool, seen: Seen | None) -> Picture:
    from qvl.media import image_header as headers
    from qvl.media import pixels

    header = headers.probe(data, policy, name)
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
