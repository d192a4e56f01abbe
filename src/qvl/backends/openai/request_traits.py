"""What the openai backend asks of a request before it sends it."""

from __future__ import annotations

import json
from typing import Final

from qvl.backends.base import Capabilities
from qvl.backends.openai.failures import FEWER, TOO_LARGE, Failed, Impact, Repeat
from qvl.backends.openai.transport import Pieces
from qvl.backends.openai.wire import Dialect, request_body
from qvl.backends.openai.wire_videos import form_named
from qvl.errors import RequestError
from qvl.media.base64_codec import FAST
from qvl.media.gate import MEDIUM, SMALL
from qvl.types import ChatRequest, JsonObject, TextPart

# The fields of a request that shape its prompt.
_OF_A_PROMPT: Final = frozenset(
    {
        *("model", "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
        "media_io_kwargs",
    }
)
PATCH: Final = 32
TEXT_PER_TOKEN: Final = 4
MIB: Final = 1 << 20


def repeatable(request: ChatRequest) -> bool:
    """Return True if the request has no side effects at the endpoint, so that it may be sent once more."""
    return not request.extra.get("store")


def is_small(request: ChatRequest) -> bool:
    """Return True if the request can be encoded on the event loop: its pictures are ready and small."""
    if request.videos:
        return False
    most, room = request.max_pixels, MEDIUM if FAST else SMALL
    for picture in request.pictures:
        if not picture.at_hand or (most is not None and picture.width * picture.height > most):
            return False
        room -= len(picture.data)
    return room >= 0


def picture_tokens(request: ChatRequest) -> float:
    """Return the estimated prompt tokens: one for each 32 x 32 pixels of pictures and each 4 characters of text."""
    texts = [part.text for message in request.messages for part in message.parts if isinstance(part, TextPart)]
    characters = sum(map(len, texts))
    areas = [picture.width * picture.height for picture in request.pictures]
    most = request.max_pixels
    pixels = sum([min(area, most) for area in areas] if most else areas)
    return 1.0 + characters / TEXT_PER_TOKEN + pixels / (PATCH * PATCH)


def prompt_fields(prompt: ChatRequest | str, model: str, have: Capabilities) -> JsonObject:
    """Return the fields of a request to `/tokenize`, its videos as they are sent; encodes, so it is for a thread."""
    if isinstance(prompt, str):
        return {"model": model, "prompt": prompt}
    form = form_named(have.video_form)
    fields = json.loads(b"".join(request_body(have.taken(prompt), model, Dialect(videos=form))))
    return {name: value for name, value in fields.items() if name in _OF_A_PROMPT}


def refuse_large(body: Pieces, most: int | None, request: ChatRequest, where: str) -> None:
    """Check that a written request has at most so many bytes; None for no limit that is known.

    Raises:
        Failed: it has more, which the endpoint at `where` would refuse once it is sent.
    """
    if most is None or (size := sum(map(len, body))) <= most:
        return
    shown = f" with its {len(request.pictures)} pictures" if request.pictures else ""
    what = f"{where} takes at most {most / MIB:.2f} MiB in a request, and this one{shown} has {size / MIB:.2f}"
    error = RequestError(what, hint=FEWER if shown else "make its texts shorter", code=TOO_LARGE)
    raise Failed(error, Repeat.NEVER, Impact.NONE)
