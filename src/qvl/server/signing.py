"""Signed text that clients carry for the server: opaque to them, and refused where a single character was changed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import zlib
from typing import Final

from qvl.errors import RequestError

_VERSION: Final = "qvl1"
# What a model thinks is bounded by its context; a blob that inflates beyond this is nobody's reasoning.
MOST_BYTES: Final = 8 * 2**20


def signed(text: str, key: bytes) -> str:
    """Return `text`, compressed, with its signature under `key`, as letters and digits."""
    packed = base64.urlsafe_b64encode(zlib.compress(json.dumps(text).encode())).decode()
    return f"{_VERSION}.{packed}.{signature_of(packed, key)}"


def signature_of(text: str, key: bytes) -> str:
    """Return the signature of `text` under `key`."""
    return hmac.new(key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def read_signed(blob: str, key: bytes, param: str) -> str:
    """Return the text of a blob that `signed` made with the same `key`.

    Raises:
        RequestError: the blob was made by another server, or was changed; it names `param`.
    """
    version, _, rest = blob.partition(".")
    packed, _, signature = rest.partition(".")
    genuine = hmac.compare_digest(signature_of(packed, key).encode(), signature.encode("utf-8", "replace"))
    if version != _VERSION or not genuine:
        raise RequestError(
            f"{param}: this server did not write it, or it was changed on the way",
            hint="send it as it came, or leave the reasoning out",
            param=param,
            code="invalid_encrypted_content",
        )
    try:
        reader = zlib.decompressobj()
        text = json.loads(reader.decompress(base64.urlsafe_b64decode(packed), MOST_BYTES))
    except (ValueError, zlib.error, binascii.Error) as exc:
        raise RequestError(f"{param}: cannot be read", param=param, code="invalid_encrypted_content") from exc
    return str(text)
