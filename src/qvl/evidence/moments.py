"""Moments of a video: the type of a schema's field that is a time, in seconds."""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeAlias

from pydantic import BeforeValidator, Field

_CLOCK: Final = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_SECONDS: Final = re.compile(r"<?\s*(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?\s*>?", re.IGNORECASE)


def seconds_of(value: object) -> object:
    """Return the seconds that a text says: 1:02.5, 0:01:02, 62.5 s, <62.5 seconds>; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if (clock := _CLOCK.fullmatch(text)) is not None:
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    told = _SECONDS.fullmatch(text)
    return value if told is None else float(told[1])


Moment: TypeAlias = Annotated[
    float,
    Field(ge=0, description="time in the video, in seconds from its start", allow_inf_nan=False),
    BeforeValidator(seconds_of),
]
"""A time in a video, in seconds from its first frame. A model that is held to the schema writes a number; of others
clock times and `<1.5 seconds>` are read too."""
