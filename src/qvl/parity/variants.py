"""A picture as faulty readers would read it, so that a reader is recognised by its pixels."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from qvl.pipeline.parse_parts import PictureLike

Signature: TypeAlias = tuple[tuple[int, int], str]
"""(width, height) and the sha256 of the pixels as RGB."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A faulty way of reading: the cause it is known as, and what it does, in words."""

    cause: str
    told: str


def variants(source: PictureLike) -> Mapping[Signature, Variant]:
    """Return the faulty readings of a picture that differ from the right one; none if it cannot be read here."""
    from PIL import Image, ImageOps

    found: dict[Signature, Variant] = {}
    try:
        if isinstance(source, bytes | bytearray):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, str | os.PathLike):
            image = Image.open(source)
        else:
            return {}
        with image:
            upright = ImageOps.exif_transpose(image)
            if upright.size != image.size or upright is not image:
                found[signature(on_colour(image, 255))] = Variant("exif", "without applying EXIF orientation")
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                found[signature(on_colour(upright, 0))] = Variant("alpha", "with alpha laid on black")
                found[signature(upright.convert("RGBA").convert("RGB"))] = Variant("alpha", "with alpha dropped")
            found.pop(signature(on_colour(upright, 255)), None)
    except (OSError, ValueError):
        return {}
    return found


def on_colour(image: Image.Image, level: int) -> Image.Image:
    """Return the picture in RGB, its alpha laid on grey of `level` from 0 to 255."""
    from PIL import Image

    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    ground = Image.new("RGBA", whole.size, (level, level, level, 255))
    return Image.alpha_composite(ground, whole).convert("RGB")


def signature(image: Image.Image) -> Signature:
    """Return the size and hash of a picture in RGB."""
    return image.size, hashlib.sha256(image.tobytes()).hexdigest()
