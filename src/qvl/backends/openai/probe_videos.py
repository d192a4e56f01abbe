"""Probes in which form an endpoint takes videos: with the frames and the times that we choose, or not at all."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final, TypeAlias, cast

from qvl.backends.openai.wire import WirePart
from qvl.backends.openai.wire_videos import VideoForm, frames_at
from qvl.types import JsonObject

# Of frames of `probe_clip.webm`, a red square for a second.
TIMES: Final = [0.0, 0.25, 0.5, 0.75]
CountTokens: TypeAlias = Callable[[WirePart, JsonObject], Awaitable[int]]


async def video_form(prompt_tokens: CountTokens, picture: str) -> VideoForm | None:
    """Return the form in which an endpoint shows the frames that it is told, at the times that it is told.

    More frames must make the prompt longer, or later ones, whose times are longer to write.

    Args:
        prompt_tokens: returns the length of a prompt with this part and these fields of the request; 0 if refused.
        picture: a frame as a `data:` URL.
    """
    clip = base64.b64encode((files("qvl.backends.openai") / "probe_clip.webm").read_bytes()).decode()
    whole = _part(f"data:video/webm;base64,{clip}")
    few = await prompt_tokens(cast("WirePart", {**whole, "timestamps": TIMES[:1]}), {})
    if few and await prompt_tokens(cast("WirePart", {**whole, "timestamps": TIMES}), {}) > few:
        return "file"
    frames = _part("data:video/jpeg;base64," + ",".join([picture.partition(",")[2]] * 2))
    early, late = ({"media_io_kwargs": {"video": frames_at(ticks)}} for ticks in ([0, 1], [0, 2 * 10**9]))
    soon = await prompt_tokens(frames, early)
    return "frames" if soon and await prompt_tokens(frames, late) > soon else None


def _part(url: str) -> WirePart:
    return {"type": "video_url", "video_url": {"url": url}}
