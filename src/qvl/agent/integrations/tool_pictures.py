"""The pictures that tools take from agents: addresses, content blocks, and files only where they are allowed."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from qvl.errors import MediaError
from qvl.media.sources import is_address
from qvl.pipeline.parse_parts import UnreadPicture, read_part
from qvl.types import JsonObject

ToolPicture = Annotated[
    str | JsonObject,
    Field(
        description="A URL, a data: URL with base64, a file path where files are allowed, or image content with "
        "data and mimeType."
    ),
]


def checked(picture: str | JsonObject, files: bool) -> UnreadPicture:
    """Return the picture of a URL, data: URL or path, or of an MCP content block.

    Raises:
        RequestError: a block that is not a picture.
        MediaError: a file path, and not `files`.
    """
    part = read_part(picture, "picture") if isinstance(picture, dict) else UnreadPicture(picture)
    if not isinstance(part, UnreadPicture):
        raise MediaError("the content block is not a picture", hint="send a block of type image")
    source = str(part.source)
    if is_address(source):
        return part
    if not files:
        raise MediaError("the server opens no files over this transport", hint="send a URL or a data: URL")
    return replace(part, source=os.path.expanduser(source))
