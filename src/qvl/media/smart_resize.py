"""The size to which a picture is resized for the model: Qwen's smart_resize, and limits set by a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Final

from qvl.errors import ConfigError, QvlError, RequestError

# Pixels of a patch's edge, times the patches that are merged to one token.
FACTOR: Final = 32
MAX_ASPECT: Final = 200
LOW_DETAIL_PIXELS: Final = 512 * 512
LEAST_MAX_PIXELS: Final = 1024
# Qwen's own lower limit where a size is asked for: four tokens.
LEAST_RESIZED: Final = 4 * FACTOR * FACTOR
# In the order of the fields of PixelLimits.
LIMIT_NAMES: Final = ("max_pixels", "min_pixels", "resized_height", "resized_width")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) as multiples of `factor`, within the pixel limits as far as the aspect ratio allows.

    Source: `smart_resize` of transformers' image processor for Qwen2-VL and later.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / beta / factor) * factor
        columns = math.floor(width / beta / factor) * factor
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return max(rows, factor), max(columns, factor)


def budget(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the largest (width, height) within `max_pixels` that keeps the aspect ratio and does not enlarge."""
    if width * height <= max_pixels:
        return width, height
    scale = (max_pixels / (width * height)) ** 0.5
    short = max(1, int(min(width, height) * scale))
    long = max(1, min(int(max(width, height) * scale), max_pixels // short))
    return (long, short) if width >= height else (short, long)


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Limits of a request on the size of a picture; None leaves the size to the media gate and the model.

    `low` is OpenAI's detail "low": a budget of LOW_DETAIL_PIXELS. `where` is the path of the request field, for errors.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    _: KW_ONLY
    low: bool = False
    where: str = field(default="", compare=False)

    def over(self, general: PixelLimits) -> PixelLimits:
        """Return these limits, with those that are unset taken from `general`."""
        if general is NO_LIMITS or general == NO_LIMITS or self.resized_height is not None:
            return self
        if self == NO_LIMITS:
            return general
        return PixelLimits(
            general.max_pixels if self.max_pixels is None else self.max_pixels,
            general.min_pixels if self.min_pixels is None else self.min_pixels,
            low=self.low,
            where=self.where or general.where,
        )

    def checked(self, max_pixels: int) -> PixelLimits:
        """Return itself, after a check against `max_pixels`, the media gate's limit.

        Raises:
            RequestError: a limit exceeds the gate's (ConfigError if it is an argument, not part of a request).
        """
        most = min(max_pixels, LOW_DETAIL_PIXELS) if self.low else max_pixels
        where = self.where
        least, height, width = self.min_pixels, self.resized_height, self.resized_width
        if least is not None and self.max_pixels is not None and least > self.max_pixels:
            raise _refused(where, "min_pixels", least, f"is above max_pixels={self.max_pixels}")
        if least is not None and least > most:
            raise _refused(where, "min_pixels", least, f"is above the limit of {most} pixels a picture")
        if height is not None and width is not None:
            if height * width > most:
                raise _refused(where, "resized_height", height, f"by {width} is above the limit of {most} pixels")
            if max(height, width) > MAX_ASPECT * min(height, width):
                raise _refused(where, "resized_height", height, f"by {width} is too narrow", f"at most {MAX_ASPECT}:1")
        return self


NO_LIMITS: Final = PixelLimits()


def read_limits(fields: Mapping[str, object], where: str = "") -> PixelLimits:
    """Return the limits among `fields`; `where` is their path in the request, "" for arguments.

    Raises:
        RequestError: an invalid value (ConfigError if it is an argument).
    """
    given = {name: value for name in LIMIT_NAMES if (value := fields.get(name)) is not None}
    if not given:
        return NO_LIMITS
    limits: dict[str, int] = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise _refused(where, name, repr(value)[:40], "is not a whole number")
        least = LEAST_MAX_PIXELS if name == "max_pixels" else 1
        if value < least:
            raise _refused(where, name, value, "is too small", f"at least {least}{' (32 x 32)' * (least > 1)}")
        limits[name] = value
    for name, other in (("resized_height", "resized_width"), ("resized_width", "resized_height")):
        if name in limits and other not in limits:
            raise _refused(where, name, limits[name], f"needs {other} beside it")
    read = PixelLimits(*map(limits.get, LIMIT_NAMES), where=where)
    if read.min_pixels is not None and read.max_pixels is not None and read.min_pixels > read.max_pixels:
        raise _refused(where, "min_pixels", read.min_pixels, f"is above max_pixels={read.max_pixels}")
    return read


def _refused(where: str, name: str, value: object, message: str, hint: str | None = None) -> QvlError:
    """Return a RequestError for the field at `where` in the request, or a ConfigError for an argument (no `where`)."""
    if not where:
        return ConfigError(f"{name}={value} {message}", hint=hint, param=name)
    return RequestError(f"{where}.{name}={value} {message}", hint=hint, param=f"{where}.{name}", code="invalid_value")
