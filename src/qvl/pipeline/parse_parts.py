"""Parser of content parts: text, and pictures in every format that clients send.

Qwen's `image`, OpenAI's `image_url` and `input_image`, Anthropic's `image` with a source, MCP's with `data` and
`mimeType`, and LangChain's standard blocks, older and newer; documents as OpenAI's `file` and `input_file`, Anthropic's
`document` and LangChain's `file`. Other parts and fields are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from pydantic import BaseModel

from qvl.errors import ConfigError, RequestError, UnsupportedInputError
from qvl.media.page_choice import PageChoice, read_pages
from qvl.media.smart_resize import LIMIT_NAMES, NO_LIMITS, PixelLimits, read_limits
from qvl.media.sources import is_address
from qvl.media.video_sampling import DEFAULT_SAMPLING, VIDEO_FIELDS, VideoSampling, read_sampling
from qvl.pipeline.parse_fields import refuse_others, text_of, type_of, unknown, wrong
from qvl.types import MAPPINGS, ImagePart, JsonMapping, Part, TextPart, VideoPart

if TYPE_CHECKING:
    from qvl.media.document import Document
    from qvl.media.picture import PictureSource
    from qvl.media.video import Video

DETAILS: Final = ("auto", "low", "high", "original")
KINDS: Final = ("text", "image_url", "input_image", "image", "video_url", "video", "file", "input_file")
_PICTURES: Final = ("image_url", "input_image", "image")
_VIDEOS: Final = ("video_url", "input_video", "video")
_DOCUMENTS: Final = ("file", "input_file", "document")
_MEDIA: Final = frozenset({*_PICTURES, *_VIDEOS, *_DOCUMENTS})
_TEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "source_type"),
    "input_text": ("text",),
    "output_text": ("text",),
    "text-plain": ("text", "mime_type", "title", "context"),
    "refusal": ("refusal",),
}
# They belong to the sender's books and say nothing to a model.
_LABELS: Final = frozenset(
    {"type", "id", "index", "uuid", "metadata", "_meta", "extras", "annotations", "citations", "logprobs"}
    | {"cache_control", "prompt_cache_breakpoint", "parsed", "provider_specific_fields"}
)
# What a model thought before its answer, as clients send it back beside that.
_THOUGHTS: Final = ("thinking", "redacted_thinking", "reasoning", "reasoning_text", "reasoning_content")
_SOURCES: Final = ("image", "image_url", "base64", "data", "url", "source")
_MEDIA_TYPES: Final = ("mime_type", "mimeType", "mediaType", "media_type")
_INNER: Final = frozenset({*_SOURCES, "file_data"})
# Fields whose value may be an object with the source in it.
_NESTED: Final = frozenset({"image_url", "source", "video_url", "video", "file"})
_ALL_SOURCES: Final = frozenset({*_SOURCES, "video_url", "video", "file", "file_data", "file_url"})
_VIDEO_SOURCES: Final = ("video_url", "video", "url", "base64", "data")
_FILE_SOURCES: Final = ("file_data", "file_url", "source", "url", "base64", "data")
_FILE_NAMES: Final = ("filename", "name", "title")
_URL_FIELDS: Final = ("url", "detail", *LIMIT_NAMES)
_IMAGE_FIELDS: Final = (*_SOURCES, "source_type", *_MEDIA_TYPES, "detail", "pages", *LIMIT_NAMES)


@dataclass(frozen=True, slots=True)
class UnreadPicture:
    """A picture, video or document of a message before it is loaded: its source, limits, and the frames or pages shown.

    `video` and `document` are True if the part says that it is one; else its name, media type or first bytes tell.
    """

    source: PictureSource | Video | Document
    limits: PixelLimits = NO_LIMITS
    sampling: VideoSampling = DEFAULT_SAMPLING
    video: bool = False
    pages: PageChoice | None = None
    document: bool = False

    def with_source(self, source: PictureSource, pages: PageChoice | None) -> UnreadPicture:
        """Return the same part with this source and these pages."""
        return UnreadPicture(source, self.limits, self.sampling, self.video, pages, self.document)

    def over(self, other: UnreadPicture) -> UnreadPicture:
        """Return a copy with the limits, frames and pages of `other` where it has none of its own."""
        pages = other.pages if self.pages is None else self.pages
        limits, sampling = self.limits.over(other.limits), self.sampling.over(other.sampling)
        return replace(self, limits=limits, sampling=sampling, pages=pages)


ContentPart: TypeAlias = Part | UnreadPicture
# What may stand for a picture beside its sources.
PARTS: Final = (*MAPPINGS, UnreadPicture)
_READ: Final = (TextPart, ImagePart, VideoPart, UnreadPicture)
# What JSON has besides text, and no source can be.
_NO_SOURCES: Final = (bool, int, float, list, *MAPPINGS)
PictureLike: TypeAlias = "PictureSource | Document | JsonMapping | UnreadPicture"
Pictures: TypeAlias = "PictureLike | Sequence[PictureLike]"
Sources: TypeAlias = Iterable[Pictures]


def read_content(content: object, where: str, *, role: str = "user") -> list[ContentPart]:
    """Return the parts of a message's content (a string or a list of parts), without an assistant's reasoning.

    Raises:
        RequestError: an invalid part; the error names the field and the known values.
    """
    if isinstance(content, str):
        return [TextPart(content)] if content else []
    if isinstance(content, list) or (
        isinstance(content, Iterable) and not isinstance(content, Mapping | bytes | bytearray | BaseModel)
    ):
        return [
            read_part(part, f"{where}[{number}]")
            for number, part in enumerate(content)
            if role != "assistant" or not _is_thought(part)
        ]
    raise wrong(where, "is missing" if content is None else f"must be text or a list of parts, not {type_of(content)}")


def read_part(part: object, where: str) -> ContentPart:
    """Return the parsed part; `where` is its path in the request, such as `messages[0].content[1]`.

    Raises:
        RequestError: an invalid field; the error names it and the known values.
    """
    if isinstance(part, _READ):
        return part
    if isinstance(part, str):
        return TextPart(part)
    if isinstance(part, dict):
        return _read_fields(part, where)
    if isinstance(part, BaseModel):
        return _read_fields(part.model_dump(warnings=False), where)
    if isinstance(part, Mapping):
        return _read_fields(part, where)
    if part is None or isinstance(part, bool | int | float | list | tuple):
        raise wrong(where, f"must be a part, not {type_of(part)}", '{"type": "text", "text": …}')
    return UnreadPicture(cast("PictureSource", part))


def _read_fields(part: JsonMapping, where: str) -> ContentPart:
    kind = _kind(part, where)
    if kind in _TEXTS:
        refuse_others(part, _TEXTS[kind], _LABELS, where)
        return TextPart(text_of(part, _TEXTS[kind][0], where))
    if kind in _DOCUMENTS:
        return _document(part, kind, where)
    if kind in _VIDEOS:
        return _video(part, where)
    picture, pages = _picture(part, kind, where), _pages(part, where)
    return picture if pages is None else replace(picture, pages=pages)


def _is_thought(part: object) -> bool:
    kind = part.get("type") if isinstance(part, MAPPINGS) else getattr(part, "type", None)
    return kind in _THOUGHTS


def thoughts_of(content: object) -> str:
    """Return the text of the reasoning parts of an assistant's content; "" if there are none."""
    if isinstance(content, str | bytes | Mapping) or not isinstance(content, Sequence):
        return ""
    texts = []
    for part in filter(_is_thought, content):
        fields = part if isinstance(part, MAPPINGS) else part.model_dump(warnings=False)
        told = [fields.get(name) for name in ("thinking", "reasoning", "reasoning_content", "text")]
        texts.append(next((text for text in told if text and isinstance(text, str)), ""))
    return "".join(texts)


def is_picture(part: object) -> bool:
    """Return True if `read_part` would return a picture, video or document for `part`."""
    return isinstance(part, MAPPINGS) and isinstance(kind := _bare_kind(part), str) and kind in _MEDIA


def picture_texts(items: Iterable[JsonMapping], *fields: str) -> Iterator[str]:
    """Yield the texts of each item's `fields` (lists of parts) that `read_part` may take for a picture's source."""
    for parts in (item.get(field) for item in items for field in fields):
        for part in filter(is_picture, parts) if isinstance(parts, list) else ():
            for name, value in part.items():
                if name not in _ALL_SOURCES:
                    continue
                if isinstance(value, str):
                    yield value
                elif isinstance(value, dict) and name in _NESTED and value.get("type") in (None, "base64", "url"):
                    # Of the type "text" it is one, of a document.
                    yield from [text for key, text in value.items() if key in _INNER and isinstance(text, str)]


def picture_field(part: JsonMapping) -> str:
    """Return the name of the field that has the picture of a part."""
    names = ("image_url", "image", "video_url", "video", "file", *_FILE_SOURCES)
    return next((name for name in names if part.get(name)), "video" if _bare_kind(part) in _VIDEOS else "image")


def _bare_kind(part: JsonMapping) -> object:
    kind = part.get("type")
    if kind is None:
        # Qwen's first form has no types, and its chat templates still read that.
        kind = next((name for name in ("text", "image", "image_url", "video", "video_url") if name in part), None)
    return kind


def _kind(part: JsonMapping, where: str) -> str:
    kind = _bare_kind(part)
    if isinstance(kind, str) and (kind in _TEXTS or kind in _MEDIA):
        return kind
    param, hint = f"{where}.type", f"known: {', '.join(KINDS)}"
    if kind is None:
        raise wrong(param, "is missing", hint)
    raise UnsupportedInputError(f"{param}: unknown value {str(kind)[:80]!r}", hint=hint, param=param)


def _picture(part: JsonMapping, kind: str, where: str) -> UnreadPicture:
    """Return the picture of a part from any one of the picture fields, whatever its `type`: clients mix them."""
    refuse_others(part, _IMAGE_FIELDS, _LABELS, where)
    limits = _with_detail(read_limits(part, where), part, where)
    named = [name for name in _SOURCES if part.get(name) is not None]
    if named == ["image_url"] or (not named and kind != "image"):
        return _image_url(part.get("image_url"), limits, f"{where}.image_url")
    source = part.get("source")
    if isinstance(source, Mapping) and named == ["source"]:
        refuse_others(source, ("type", "data", "base64", "url", "media_type", "mime_type"), _LABELS, f"{where}.source")
        if source.get("type") not in (None, "base64", "url"):
            raise unknown(f"{where}.source.type", source["type"], ("base64", "url"))
        return UnreadPicture(_source(source, f"{where}.source"), limits)
    if part.get("source_type") not in (None, "base64", "url"):
        raise unknown(f"{where}.source_type", part["source_type"], ("base64", "url"))
    return UnreadPicture(_source(part, where), limits)


def _image_url(value: object, limits: PixelLimits, where: str) -> UnreadPicture:
    inner: JsonMapping = {}
    param = where
    if isinstance(value, MAPPINGS):
        inner = value
        refuse_others(inner, _URL_FIELDS, _LABELS, where)
        param = f"{where}.url"
        value = inner.get("url")
    if not isinstance(value, str) and (value is None or isinstance(value, _NO_SOURCES)):
        raise wrong(param, "is missing" if value is None else f"must be a URL, not {type_of(value)}")
    return UnreadPicture(
        cast("PictureSource", value), _with_detail(read_limits(inner, where).over(limits), inner, where)
    )


def _video(part: JsonMapping, where: str) -> UnreadPicture:
    """Return the video of a part: vLLM's and Qwen's `video_url` and `video`, and LangChain's standard block."""
    known = (*_VIDEO_SOURCES, "source_type", *_MEDIA_TYPES, *VIDEO_FIELDS, "num_frames", *LIMIT_NAMES)
    refuse_others(part, known, _LABELS, where)
    named = [name for name in _VIDEO_SOURCES if part.get(name) is not None]
    if len(named) != 1:
        fault = f"names a video by {' and by '.join(named)}" if named else "has no video"
        raise wrong(where, fault, "use one of video_url, video, url, base64, data")
    value, at = part[named[0]], f"{where}.{named[0]}"
    inner: JsonMapping = {}
    if isinstance(value, Mapping):
        inner = value
        refuse_others(inner, ("url", *VIDEO_FIELDS, "num_frames", *LIMIT_NAMES), _LABELS, at)
        value, at = inner.get("url"), f"{at}.url"
    # Encoded frames one behind another, as vLLM takes them; with no times.
    if isinstance(value, list | tuple) or (isinstance(value, str) and value[:15].lower() == "data:video/jpeg"):
        hint = "send the frames as pictures, each behind a text with its time"
        raise UnsupportedInputError(f"{at}: a list of frames is not a video", hint=hint, param=at)
    if value is None or isinstance(value, bool | int | float | Mapping):
        raise wrong(at, "is missing" if value is None else f"must be a URL, not {type_of(value)}")
    if named[0] in ("base64", "data") and isinstance(value, str) and value[:5].lower() != "data:":
        media_type = next((part[name] for name in _MEDIA_TYPES if part.get(name)), "video/mp4")
        value = f"data:{media_type};base64,{value}"
    limits = read_limits(inner, where).over(read_limits(part, where))
    sampling = read_sampling(inner, where).over(read_sampling(part, where))
    return UnreadPicture(cast("PictureSource", value), limits, sampling, video=True)


def _document(part: JsonMapping, kind: str, where: str) -> UnreadPicture:
    """Return the document of a part: its fields stand in the part itself, or for OpenAI's chat in its `file`."""
    fields, at = part, where
    beside = ("pages", *LIMIT_NAMES, "detail")
    if part.get("file") is not None:
        refuse_others(part, ("file", *beside), _LABELS, where)
        fields, at = part["file"], f"{where}.file"
        if not isinstance(fields, Mapping):
            hint = '{"file_data": "data:application/pdf;base64,…"}'
            raise wrong(at, f"must be an object, not {type_of(fields)}", hint)
    known = (*_FILE_SOURCES, "source_type", "file_id", *_FILE_NAMES, "context", *_MEDIA_TYPES, "format", *beside)
    refuse_others(fields, known, _LABELS, at)
    if fields.get("file_id") is not None:
        what = f"{at}.file_id: files are not looked up here"
        raise UnsupportedInputError(what, hint="send file_data, a data: URL, or file_url", param=f"{at}.file_id")
    named = [name for name in _FILE_SOURCES if fields.get(name) is not None]
    if len(named) != 1:
        fault = f"names a document by {' and by '.join(named)}" if named else "has no document"
        hint = "file_url or file_data" if kind == "input_file" else "file_data" if kind == "file" else "source"
        raise wrong(at, fault, f"use {hint}")
    if named[0] == "source":
        source, inner = fields["source"], f"{at}.source"
        if not isinstance(source, Mapping):
            raise wrong(inner, f"must be an object, not {type_of(source)}")
        if source.get("type") not in ("base64", "url"):
            raise unknown(f"{inner}.type", source.get("type"), ("base64", "url"))
        refuse_others(source, ("type", "data", "url", *_MEDIA_TYPES), (), inner)
        name = "data" if source["type"] == "base64" else "url"
        value, media = text_of(source, name, inner), source
    else:
        name, media = named[0], fields
        value = fields[name] if isinstance(fields[name], bytes) else text_of(fields, name, at)
    if name in ("file_data", "base64", "data") and isinstance(value, str) and not is_address(value):
        # Bare base64 is what Anthropic asks for, and what many send to the others.
        kind_of = next((media[name] for name in _MEDIA_TYPES if media.get(name)), "application/pdf")
        value = f"data:{kind_of};base64,{value}"
    limits = _with_detail(read_limits(fields, at).over(read_limits(part, where)), part, where)
    return UnreadPicture(value, limits, pages=_pages(part, where) or _pages(fields, at), document=True)


def _pages(part: JsonMapping, where: str) -> PageChoice | None:
    """Return the pages that a part names; None without them.

    Raises:
        RequestError: it names no pages.
    """
    if part.get("pages") is None:
        return None
    try:
        return read_pages(part["pages"], f"{where}.pages")
    except ConfigError as exc:
        raise RequestError(exc.message, hint=exc.hint, param=exc.param) from None


def _source(part: JsonMapping, where: str) -> PictureSource:
    """Return the source of a part's picture: a URL, a data: URL made from base64, or a Python object."""
    named = [name for name in _SOURCES if part.get(name) is not None]
    if len(named) != 1:
        fault = f"names a picture by {' and by '.join(named)}" if named else "has no picture"
        raise wrong(where, fault, "use one of image, image_url, url, base64, data, source")
    value: PictureSource = part[named[0]]
    if named[0] == "url":
        return text_of(part, "url", where)
    if named[0] not in ("base64", "data") or isinstance(value, bytes):
        return value
    value = text_of(part, named[0], where)
    if value[:5].lower() == "data:":
        return value
    media_type = next((part[name] for name in ("mime_type", "mimeType", "media_type") if part.get(name)), "image/png")
    return f"data:{media_type};base64,{value}"


def _with_detail(limits: PixelLimits, part: JsonMapping, where: str) -> PixelLimits:
    detail = part.get("detail")
    if detail is None:
        return limits
    if detail not in DETAILS:
        raise unknown(f"{where}.detail", detail, DETAILS)
    low = detail == "low"
    return limits if limits.low == low else replace(limits, low=low, where=limits.where or where)
