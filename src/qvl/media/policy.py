"""The limits of the media gate."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import Final

from qvl.errors import ConfigError
from qvl.media.smart_resize import (
    FACTOR,
    LEAST_RESIZED,
    LOW_DETAIL_PIXELS,
    NO_LIMITS,
    PixelLimits,
    budget,
    smart_resize,
)

FORMATS: Final = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL"})


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """The limits of the gate. Sizes are in bytes or pixels, times in seconds.

    Args:
        max_pixels: budget of the canonical picture; larger ones are downscaled, aspect ratio kept.
        min_pixels: smaller pictures are enlarged by Qwen's smart_resize; 0 leaves it to the model.
        limits: a request's limits on the size of one picture, within `max_pixels`.
        max_bytes: largest encoded picture that is read, from a file, a URL or memory.
        max_source_pixels: largest picture that is decoded at all (decompression bombs).
        max_decode_bytes: most memory that decoding one picture may take, estimated from its header. Within the default
            stay, in millions of pixels: 178 as baseline JPEG, 38 as progressive one (26 without subsampling), 67 as RGB
            PNG (26 with alpha), 16 as RGB WebP and 14 as RGB AVIF.
        max_decode_seconds: most processor time that decoding one picture may take.
        max_frames: most frames of an animation, or pages of a TIFF; only the first is used.
        max_videos: most videos of a request; None: any number.
        max_video_bytes: largest video that is read.
        max_video_seconds: longest video, or part of one, that is looked at.
        max_video_frames: most frames of a video that are shown to a model.
        max_video_pixels: budget of those frames together; larger ones are downscaled, aspect ratio kept.
        max_video_decode_seconds: most time that finding and decoding those frames may take.
        max_pages: most pages of a document in one request.
        max_document_pixels: pixels of all pages that `analyze` shows in one request; it asks about more page by page.
        max_document_seconds: most processor time that opening a document, or rendering one page, may take.
        document_dpi: pixels an inch of a page, of which its boxes are told; within `max_pixels`, as for any picture.
        max_aspect: largest ratio of the long to the short side.
        timeout: for the whole of a fetch, redirects included.
        max_redirects: each hop is checked like the first address.
        formats: Pillow's format names; JPEG includes MPO; HEIF (of phones) and JXL need the extra `formats`.
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
    max_videos: int | None = 8
    max_video_bytes: int = 256 * 1024 * 1024
    max_video_seconds: float = 3_600.0
    max_video_frames: int = 768
    max_video_pixels: int = 50_331_648
    max_video_decode_seconds: float = 60.0
    max_pages: int = 64
    max_document_pixels: int = 20_971_520
    max_document_seconds: float = 10.0
    document_dpi: float = 200.0
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
        for name in ("max_video_bytes", "max_video_frames", "max_video_pixels", "max_pages", "max_document_pixels"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        self._check("document_dpi", 1 <= self.document_dpi <= 2400, "from 1 to 2400")
        self._check("max_videos", self.max_videos is None or self.max_videos >= 0, "0 or more, or None")
        self._check("min_pixels", 0 <= self.min_pixels <= self.max_pixels, f"from 0 to max_pixels, {self.max_pixels}")
        seconds = ("max_decode_seconds", "max_video_seconds", "max_video_decode_seconds", "max_document_seconds")
        for name in ("timeout", *seconds):
            self._check(name, getattr(self, name) > 0, "above 0, in seconds")
        self._check("max_redirects", self.max_redirects >= 0, "0 or more")
        for name in ("formats", "allowed_domains", "allowed_private"):
            self._check(name, not isinstance(getattr(self, name), str), "a list of strings")
        known = {"JPG": "JPEG", "MPO": "JPEG", "TIF": "TIFF", "HEIC": "HEIF"}
        upper = [form.upper() for form in self.formats]
        object.__setattr__(self, "formats", frozenset(known.get(form, form) for form in upper))
        self._check("formats", bool(self.formats) and self.formats <= FORMATS, f"of {', '.join(sorted(FORMATS))}")
        for name in ("allowed_domains", "allowed_private"):
            hosts = tuple(host.strip().rstrip(".").lower() for host in getattr(self, name))
            self._check(name, all(host.strip(".") and "://" not in host for host in hosts), "host names, no URLs")
            object.__setattr__(self, name, hosts)
        for entry in self.allowed_private:
            if "/" in entry:
                self._check("allowed_private", _is_network(entry), "networks as 10.1.0.0/16")

    def with_sizes(self, max_pixels: int | None, min_pixels: int | None) -> MediaPolicy:
        """Return a copy with these pixel budgets; None keeps the current one."""
        return replace(
            self,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
        )

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"invalid {name}={getattr(self, name)!r}", hint=allowed, param=name)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


DEFAULT_POLICY: Final = MediaPolicy()


def canonical_size(width: int, height: int, policy: MediaPolicy) -> tuple[int, int, bool]:
    """Return (width, height, `Picture.sized`) of a picture of this source size under `policy`.

    With limits of a request the size is smart_resize's; otherwise a picture above the gate's budget is downscaled
    with its aspect ratio kept.
    """
    limits = policy.limits
    most = min(policy.max_pixels, LOW_DETAIL_PIXELS) if limits.low else policy.max_pixels
    if limits.resized_height is not None and limits.resized_width is not None:
        rows, columns = smart_resize(limits.resized_height, limits.resized_width, FACTOR, LEAST_RESIZED, most)
        return columns, rows, True
    least = policy.min_pixels if limits.min_pixels is None else limits.min_pixels
    if limits.max_pixels is None and not least:
        return *budget(width, height, most), False
    most = min(most, limits.max_pixels or most)
    rows, columns = smart_resize(height, width, FACTOR, least, most)
    plain = smart_resize(height, width, FACTOR, 0, 2**62)
    if (rows, columns) == plain and least <= width * height <= most:
        # The model rounds to the same size by itself, and the bytes pass as they are.
        return width, height, bool(least)
    return columns, rows, True
