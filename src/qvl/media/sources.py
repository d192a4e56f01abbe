"""Reads encoded picture bytes from paths, `file:` and `data:` URLs, memory and file objects, without decoding."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from qvl.errors import MediaError
from qvl.media import base64_codec
from qvl.media.base64_codec import Base64Picture
from qvl.media.document_head import is_document
from qvl.media.image_header import sniff
from qvl.media.video_head import HEAD, container_of

if TYPE_CHECKING:
    from qvl.media.policy import MediaPolicy

_SCHEME: Final = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.\-]+):(//)?")
_BASE64_HEADS: Final = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")
_UNNAMED: Final = ("", "image", "application/octet-stream", "binary/octet-stream")
DOCUMENTS: Final = ("application/pdf", "application/x-pdf")
_NAME_LENGTH: Final = 160
MAX_LABEL: Final = 1000
_PIECE: Final = 64 * 1024
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_BLANKS: Final = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"
_WIDE_BLANKS: Final = tuple(char for char in map(chr, range(0x80, 0x3001)) if char.isspace())


def read(source: object, policy: MediaPolicy) -> tuple[bytes, str]:
    """Return (encoded bytes of `source`, its short display name).

    Raises:
        MediaError: it is not a source of bytes, cannot be read, is refused, or is larger than `policy.max_bytes`.
    """
    if isinstance(source, str):
        return _read_text(source, policy)
    if isinstance(source, Base64Picture):
        kind, _, name = _label(source.head)
        return _as_picture(source.data, kind, name, policy), name
    if isinstance(source, os.PathLike):
        return _read_path(os.fsdecode(source), policy)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _limited(bytes(source), policy, "<bytes>"), "<bytes>"
    if callable(getattr(source, "read", None)):
        return _read_file(cast("IO[bytes]", source), policy)
    raise MediaError(
        f"a {type(source).__name__} is not a picture",
        hint="pass a path, URL, bytes, binary file object, PIL image, numpy array or torch tensor",
    )


def is_address(source: object) -> bool:
    """True for an http(s) or data: URL; any other string is a path."""
    return isinstance(source, str) and source.strip()[:8].lower().startswith(("http://", "https://", "data:"))


def short(name: str) -> str:
    """Return `name` on one line, at most 160 characters."""
    if not name.isprintable():
        name = "".join(char if char.isprintable() else "?" for char in name)
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def _limited(data: bytes, policy: MediaPolicy, name: str) -> bytes:
    if len(data) > policy.max_bytes:
        raise too_large(name, policy)
    return data


def too_large(name: str, policy: MediaPolicy) -> MediaError:
    """Return the error for more encoded bytes than the policy allows."""
    return MediaError(
        f"{name}: more than the limit of {policy.max_bytes} bytes",
        hint="make the picture smaller first",
        code="image_too_large",
    )


def _read_text(text: str, policy: MediaPolicy) -> tuple[bytes, str]:
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    if scheme == "data":
        return _read_data_url(text.strip(), policy)
    if scheme == "file":
        return _read_path(_path_of_file_url(text.strip()), policy)
    if match and match[2]:
        raise MediaError(
            f"unsupported URL scheme {scheme}:", hint="use http, https, data: or a path", code="image_url_blocked"
        )
    if not text.strip():
        raise MediaError("the path or URL of a picture is empty", hint="pass a path or a URL")
    if len(text) > 512 and text.startswith(_BASE64_HEADS):
        raise MediaError("the picture is base64, not a path", hint="put 'data:image/png;base64,' in front of it")
    # A name with a null byte has no home; reading it says what is wrong.
    with suppress(ValueError):
        text = os.path.expanduser(text)
    return _read_path(text, policy)


def _path_of_file_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise MediaError(f"invalid file: URL {short(url)}", hint="write file:///path or pass the path") from exc
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"file: URL names the host {short(parts.netloc)!r}", hint="write file:///path")
    return url2pathname(parts.path) if os.name == "nt" else unquote(parts.path)


def _read_path(path: str, policy: MediaPolicy) -> tuple[bytes, str]:
    name = short(path)
    if not policy.allow_files:
        raise MediaError(
            "paths are not accepted for pictures here",
            hint="send an http(s) or data: URL, or the bytes",
            code="image_url_blocked",
        )
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{name} is a folder", hint="name a picture in it, or a glob such as folder/*.png")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a regular file", hint="pass an open file object to read from a pipe")
        if status.st_size > policy.max_bytes:
            raise too_large(name, policy)
        with open(path, "rb") as file:
            return _limited(file.read(), policy, name), name
    except MediaError:
        raise
    except FileNotFoundError as exc:
        raise MediaError(f"no such file: {name}", hint=_near(path)) from exc
    except PermissionError as exc:
        raise MediaError(f"{name} may not be read", hint="check its permissions") from exc
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise MediaError(f"{name} cannot be read: {reason or type(exc).__name__}", hint="check the path") from exc


def _near(path: str) -> str:
    """Return a hint for a path that does not exist: its missing folder, or another likely mistake."""
    if path.rstrip().endswith(("?", "\uff1f")) or (len(path.split()) > 2 and not Path(path).suffix):
        return "a question comes last, after the pictures"
    folder = Path(path).parent
    if not folder.exists():
        return f"the folder {short(str(folder))} does not exist either"
    return "check the spelling" if os.path.isabs(path) else f"looked from {short(os.getcwd())}"


def _read_file(file: IO[bytes], policy: MediaPolicy) -> tuple[bytes, str]:
    """Return (bytes, name) of a file object, read from its start if it can seek, as in PIL, else from its position."""
    file_name = getattr(file, "name", None)
    name = short(file_name) if isinstance(file_name, str) and file_name else "<file>"
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(0)
        data: object = file.read(policy.max_bytes + 1)
    except (OSError, ValueError) as exc:
        raise MediaError(f"{name} cannot be read: {exc}", hint="pass a file object that is open for reading") from exc
    if not isinstance(data, (bytes, bytearray)):
        raise MediaError(f"{name} is open as text", hint="open it with mode 'rb'")
    return _limited(bytes(data), policy, name), name


def _read_data_url(url: str, policy: MediaPolicy) -> tuple[bytes, str]:
    """Return (bytes, name) of a `data:` URL (RFC 2397): base64, standard or URL-safe, or percent-encoded.

    The media type matters only if the bytes are not a picture.
    """
    # Not by partition, which would copy megabytes once more.
    comma = url.find(",")
    if comma < 0:
        raise MediaError("a data: URL needs a comma before its data", hint="data:image/png;base64,...")
    kind, options, name = _label(url[:comma])
    payload = url[comma + 1 :]
    if len(payload) > policy.max_bytes * 4:
        raise too_large(name, policy)
    data = _unpacked(payload, policy, name) if "base64" in options else _unquoted(payload, policy, name)
    return _as_picture(data, kind, name, policy), name


@lru_cache(64)
def _label(head: str) -> tuple[str, tuple[str, ...], str]:
    """Return (media type, options, short display name) of a `data:` URL's part in front of its comma."""
    meta = head[len("data:") :]
    if len(meta) > MAX_LABEL:
        problem = f"a data: URL has {len(meta)} characters before its comma, more than {MAX_LABEL}"
        raise MediaError(problem, hint="data:image/png;base64,...")
    kind, *options = [piece.strip() for piece in meta.lower().split(";")]
    return kind, tuple(options), f"data:{short(kind)[:60]}"


def is_base64(head: str) -> bool:
    """True if `head` is the part in front of the comma of a `data:` URL of base64."""
    return head.startswith("data:") and len(head) <= MAX_LABEL and "," not in head and "base64" in _label(head)[1]


def _as_picture(data: bytes, kind: str, name: str, policy: MediaPolicy) -> bytes:
    if not (is_label_of_picture(kind) or sniff(data) or container_of(data[:HEAD]) or is_document(data)):
        raise MediaError(
            f"a data: URL of {short(kind)[:60]} is not a picture", hint="use image/*", code="image_url_blocked"
        )
    return _limited(data, policy, name)


def is_label_of_picture(kind: str) -> bool:
    """True if a media type, in lower case, may be that of a picture or a PDF."""
    return kind in _UNNAMED or kind in DOCUMENTS or kind.startswith("image/")


def _unpacked(payload: str, policy: MediaPolicy, name: str) -> bytes:
    if len(payload) * 3 // 4 <= policy.max_bytes:
        # As nearly everybody writes it; what is not so strict is put in order below, which takes longer than decoding.
        with suppress(ValueError):
            return base64_codec.decoded(payload)
    try:
        text = _unquoted(payload, policy, name, 4 / 3) if "%" in payload else _ascii(payload)
        text = text.translate(_URL_SAFE, _BLANKS).rstrip(b"=")
        if len(text) * 3 // 4 > policy.max_bytes:
            raise too_large(name, policy)
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except MediaError:
        raise
    except (binascii.Error, ValueError) as exc:
        raise MediaError("the base64 of a data: URL is broken", hint=str(exc), code="image_decode_failed") from exc


def _ascii(payload: str) -> bytes:
    for blank in () if payload.isascii() else _WIDE_BLANKS:
        payload = payload.replace(blank, "")
    return payload.encode("ascii")


def _unquoted(payload: str, policy: MediaPolicy, name: str, room: float = 1.0) -> bytes:
    """Return percent-encoded text as bytes, decoded in pieces to bound the memory.

    Raises:
        MediaError: there are more than `room` times the policy's `max_bytes`.
    """
    decoded = bytearray()
    at = 0
    while at < len(payload):
        end = at + _PIECE
        # Not between a percent sign and its digits.
        cut = payload.rfind("%", end - 2, end)
        end = end if cut < 0 else cut
        decoded += unquote_to_bytes(payload[at:end])
        if len(decoded) > policy.max_bytes * room:
            raise too_large(name, policy)
        at = end
    return bytes(decoded)
