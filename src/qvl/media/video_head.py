"""Tells videos and sound by the first bytes of their files."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from qvl.media.base64_codec import Base64Picture

# What JPEG and PNG begin with. The lengths in them may have the signs of a container.
USUAL_PICTURES: Final = (b"\xff\xd8\xff", b"\x89PNG")
# First brands of files in the same container that are pictures.
_PICTURE_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_BOXES: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_HEADS: Final = (
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogg"),
    (b"0&\xb2u\x8ef\xcf\x11", "asf"),
)
_SOUNDS: Final = (b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf1", b"\xff\xf9", b"#!AMR")
HEAD: Final = 200
_ENDINGS: Final = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg"),
    *(".vob", ".flv", ".ogv", ".wmv", ".asf"),
)


def container_of(head: bytes) -> str | None:
    """Return FFmpeg's name of the container whose file begins with `head` (HEAD bytes), None if it is no video.

    Naming it keeps playlists and other formats that open further files away from FFmpeg.
    """
    if head.startswith(USUAL_PICTURES):
        return None
    if head[4:8] in _BOXES:
        return None if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS else "mov"
    if head[:4] == b"RIFF":
        return "avi" if head[8:11] == b"AVI" else None
    if (head[:1] == b"G" and head[188:189] == b"G") or (head[4:5] == b"G" and head[196:197] == b"G"):
        return "mpegts"
    return next((name for start, name in _HEADS if head.startswith(start)), None)


def is_sound(head: bytes) -> bool:
    """True if `head` begins a file of sound alone."""
    return head.startswith(_SOUNDS) or (head[:4] == b"RIFF" and head[8:12] == b"WAVE")


def looks_like_video(source: object, *, files: bool = True) -> bool:
    """True if `source` is a video by its name, its media type or its first bytes.

    No URL is fetched for that, and with `files` False no file is opened.
    """
    if isinstance(source, Base64Picture):
        return source.head[:11].lower() == "data:video/" or container_of(source.data[:HEAD]) is not None
    if isinstance(source, bytes | bytearray | memoryview):
        return container_of(bytes(source[:HEAD])) is not None
    if isinstance(source, str):
        text = source[:4096].strip()
        if text[:11].lower() == "data:video/":
            return True
        if text[:8].lower().startswith(("http://", "https://")):
            return text.split("#")[0].split("?")[0].lower().endswith(_ENDINGS)
        if text[:5].lower() == "data:":
            return False
    elif not isinstance(source, os.PathLike):
        return False
    path = os.path.expanduser(os.fsdecode(source))
    if path.lower().endswith(_ENDINGS):
        return True
    if not files:
        return False
    with suppress(OSError, ValueError), open(path.removeprefix("file://"), "rb") as file:
        return container_of(file.read(HEAD)) is not None
    return False
