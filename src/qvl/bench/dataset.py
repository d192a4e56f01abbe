"""Sources of benchmark requests: JSONL files in several formats, one picture, or drawn pictures.

| form of a line | comes from |
|---|---|
| `{"messages": [...]}`, a bare list of messages | OpenAI; `"images": [...]` beside it from training sets |
| `{"prompt"}`, `{"text"}`, `{"question"}` | text alone |
| `{"image_path"}`, `{"image_url"}`, `{"image"}`, `{"images"}` with or without a text | product catalogues |
| `{"prompt", "image_files"}`, `{"content": [...]}` | vLLM's benchmark |
| `{"custom_id", "method", "url", "body"}` | OpenAI's batch files |

`id` (or `custom_id`) names an item and `expected` is the right answer. A line with a text and a picture has both.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from qvl.config import in_home
from qvl.errors import ConfigError
from qvl.sampling import SamplingParams
from qvl.types import JsonMapping, JsonObject

TEXT_KEYS: Final = ("prompt", "text", "question", "query")
PICTURE_KEYS: Final = ("image_path", "image_url", "image", "images", "image_files", "image_paths", "image_urls")
PARAMS: Final = (SamplingParams.names() - {"n"}) | {
    "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
}  # fmt: skip
NOT_OURS: Final = frozenset({"model", "messages", "stream", "stream_options"})
DRAWN: Final = "drawn:"
MOST_LISTED: Final = 1000
_MARK: Final = "<image>"
Messages: TypeAlias = tuple[JsonObject, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One request to make, read from a line of the input.

    Args:
        index: the item's position among all items of the input, from 0.
        id: the `id` in the line, else `file:line`.
        messages: in OpenAI's format; `image_url` parts have the picture's path or URL as in the input.
        params: the request fields that the line itself sets.
        expected: the correct answer, a text or an object; None if the line has none.
        where: the line as `file:line`, for error messages.
        base: the folder to which relative picture paths belong.
    """

    index: int
    id: str
    messages: Messages
    params: JsonMapping = field(default_factory=dict)
    expected: object = None
    where: str = ""
    base: Path | None = None

    def picture_parts(self) -> Iterator[JsonObject]:
        """Yield the content parts with a picture, in order."""
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list):
                yield from (part for part in content if part.get("type") == "image_url")


@dataclass(frozen=True, slots=True)
class BadLine:
    """An invalid line of the input: its `file:line` and the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Dataset(Protocol):
    """A source of items that yields the same items in the same order on every iteration."""

    def __iter__(self) -> Iterator[Item]: ...
    def facts(self) -> dict[str, object]: ...


class NoRequestError(ValueError):
    """A line that is not a valid request; the message is the reason."""


class Files:
    """Items of JSONL files, read line by line and not held in memory.

    Args:
        patterns: files and globs; a picture file is one item, with `prompt` as its question.
        base_dir: the folder to which relative picture paths belong; None is the JSONL file's folder.
        prompt: the question for lines and files that have a picture but no text.
        media: the fields in which a line may have its pictures.
        strict: True to raise at the first invalid line.
        on_bad: called for each invalid line, in the first iteration only.

    Raises:
        ConfigError: no file matches, a file cannot be read, or (while iterating, with `strict`) an invalid line.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        base_dir: Path | None = None,
        prompt: str = "Describe it.",
        media: Sequence[str] = PICTURE_KEYS,
        strict: bool = False,
        on_bad: Callable[[BadLine], None] | None = None,
    ) -> None:
        self.media = media
        self.paths = [path for pattern in patterns for path in _expand(pattern)]
        self.base_dir = base_dir
        self.prompt = prompt
        self.strict = strict
        self.on_bad = on_bad
        self.bad: list[BadLine] = []
        self.bad_count = 0
        self._read_once = False

    def facts(self) -> dict[str, object]:
        """Return the files of the input with their sizes, by which a resumed run checks that the input is the same."""
        return {"files": [[str(path), path.stat().st_size] for path in self.paths], "prompt": self.prompt}

    def __iter__(self) -> Iterator[Item]:
        index = 0
        first, self._read_once = not self._read_once, True
        for path in self.paths:
            try:
                with path.open("rb") as lines:
                    for number, line in enumerate(lines, 1):
                        if not line.strip():
                            continue
                        where = f"{path}:{number}"
                        try:
                            item = self._item(line, index, path, number)
                        except NoRequestError as exc:
                            self._note(BadLine(where, str(exc)), first)
                            continue
                        yield item
                        index += 1
            except OSError as exc:
                raise ConfigError(f"{path} cannot be read: {exc.strerror}", hint="name a JSONL file") from exc

    def _item(self, line: bytes, index: int, path: Path, number: int) -> Item:
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as exc:
            raise NoRequestError(f"invalid JSON: {str(exc)[:100]}") from exc
        name, messages, params, expected = read_form(value, self.prompt, self.media)
        base = self.base_dir or path.parent
        where = f"{path}:{number}"
        return Item(index, name or f"{path.name}:{number}", messages, params, expected, where, base)

    def _note(self, bad: BadLine, first: bool) -> None:
        if self.strict:
            raise ConfigError(f"bad line: {bad}", hint="correct it, or omit --strict to skip such lines")
        if first:
            self.bad_count += 1
            if len(self.bad) < MOST_LISTED:
                self.bad.append(bad)
            if self.on_bad is not None:
                self.on_bad(bad)


class NamedRequest:
    """A dataset of one request with the pictures and the question of the command line."""

    def __init__(self, pictures: Sequence[str], prompt: str) -> None:
        self.pictures = tuple(pictures)
        self.prompt = prompt

    def facts(self) -> dict[str, object]:
        return {"pictures": list(self.pictures), "prompt": self.prompt}

    def __iter__(self) -> Iterator[Item]:
        name = self.pictures[0] if self.pictures else "prompt"
        yield Item(0, name, (_user(self.prompt, self.pictures),), where=name, base=Path.cwd())


class Drawn:
    """A dataset of `count` different drawn product pictures of `size` (width, height), with `prompt` as the question.

    `first_seed` offsets the pictures' seeds, so that two sets share none.
    """

    def __init__(self, count: int, size: tuple[int, int], *, prompt: str = "Describe it.", first_seed: int = 0) -> None:
        self.count, self.size, self.prompt, self.first_seed = count, size, prompt, first_seed

    def facts(self) -> dict[str, object]:
        return {"drawn": self.count, "size": list(self.size), "prompt": self.prompt, "seed": self.first_seed}

    def __iter__(self) -> Iterator[Item]:
        width, height = self.size
        for index in range(self.count):
            seed = self.first_seed + index
            message = _user(self.prompt, (f"{DRAWN}{seed}:{width}x{height}",))
            yield Item(index, f"synthetic-{seed}", (message,), where=f"synthetic:{seed}")


def endless(dataset: Dataset) -> Iterator[Item]:
    """Yield the items repeatedly; from the second round on their ids end in `#2`, `#3` and so on.

    Raises:
        ConfigError: the dataset has no items.
    """
    index = 0
    for lap in count(1):
        before = index
        for item in dataset:
            yield replace(item, index=index, id=item.id if lap == 1 else f"{item.id}#{lap}")
            index += 1
        if index == before:
            raise ConfigError("the input has no requests", hint="see the bad lines above")


def read_form(
    value: object, prompt: str, media: Sequence[str] = PICTURE_KEYS
) -> tuple[str | None, Messages, JsonObject, object]:
    """Return (id, messages, params, expected) of `value`, a line parsed as JSON; fields are as in `Item`.

    Raises:
        NoRequestError: the format of the value is unknown.
    """
    if isinstance(value, list):
        return None, _messages(value), {}, None
    if not isinstance(value, dict):
        raise NoRequestError(f"a line must be an object or a list of messages, not {type(value).__name__}")
    name = value.get("custom_id", value.get("id"))
    name = None if name is None else str(name)
    expected = value.get("expected")
    body = value.get("body")
    if isinstance(body, dict):
        url = str(value.get("url") or "/v1/chat/completions")
        if not url.endswith("/chat/completions"):
            raise NoRequestError(f"the line is for {url[:60]}; only /v1/chat/completions is supported")
        params = {key: setting for key, setting in body.items() if key not in NOT_OURS}
        return name, _messages(body.get("messages")), params, expected
    params = {key: value[key] for key in PARAMS if value.get(key) is not None}
    pictures = [source for key in media if value.get(key) is not None for source in _sources(value[key], key)]
    if value.get("messages") is not None:
        messages = _messages(value["messages"])
        return name, _illustrated(messages, pictures) if pictures else messages, params, expected
    if isinstance(value.get("content"), list):
        return name, _messages([{"role": "user", "content": value["content"]}]), params, expected
    text = next((value[key] for key in TEXT_KEYS if value.get(key) is not None), None)
    if text is None and not pictures:
        raise NoRequestError(f"the object has no messages, text or picture, only: {', '.join(map(str, value))[:100]}")
    if text is not None and not isinstance(text, str):
        raise NoRequestError(f"the text must be a string, not {type(text).__name__}")
    return name, (_user(prompt if text is None else text, pictures),), params, expected


def _user(text: str, pictures: Sequence[str]) -> JsonObject:
    if not pictures:
        return {"role": "user", "content": text}
    parts = [_picture(source) for source in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _picture(source: str, **more: object) -> JsonObject:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def _sources(value: object, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    sources = [source.get("url", source.get("path")) if isinstance(source, dict) else source for source in values]
    names = [source for source in sources if isinstance(source, str)]
    if len(names) < len(sources):
        raise NoRequestError(f"{key} must be a picture name or a list of them")
    return names


def _illustrated(messages: Messages, pictures: list[str]) -> Messages:
    """Return `messages` with `pictures` in place of `<image>` marks, else in the first user message."""
    unplaced = list(pictures)
    question = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    made = []
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        marked: list[JsonObject] = []
        for part in parts:
            texts = part["text"].split(_MARK) if part.get("type") == "text" else []
            if len(texts) < 2:
                marked.append(part)
                continue
            for before, text in enumerate(texts):
                if before and unplaced:
                    marked.append(_picture(unplaced.pop(0)))
                if text:
                    marked.append({"type": "text", "text": text})
        made.append(message if marked == parts and index != question else {**message, "content": marked})
    if unplaced:
        made[question] = {**made[question], "content": [*map(_picture, unplaced), *made[question]["content"]]}
    return tuple(made)


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise NoRequestError("messages must be a non-empty list")
    made = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NoRequestError("a message must be an object with a role")
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part) for part in content]
        elif content is not None and not isinstance(content, str):
            raise NoRequestError(f"content must be a string or a list, not {type(content).__name__}")
        made.append({**message, "content": content})
    return tuple(made)


def _part(part: object) -> JsonObject:
    """Return a content part in OpenAI's chat format; Qwen's and the Responses API's formats are converted."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise NoRequestError("a content part must be an object or a string")
    kind = part.get("type") or next((key for key in ("text", "image", "image_url") if key in part), None)
    if kind in ("text", "input_text"):
        if not isinstance(part.get("text"), str):
            raise NoRequestError("a text part has no text")
        return {"type": "text", "text": part["text"]}
    if kind in ("image_url", "image", "input_image"):
        source = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None), None)
        more = {}
        if isinstance(source, dict):
            more = {key: value for key, value in source.items() if key not in ("url", "path")}
            source = source.get("url", source.get("path"))
        if not isinstance(source, str):
            raise NoRequestError("a picture part has no picture")
        return _picture(source, **more)
    if kind is None:
        raise NoRequestError("a content part has no type")
    return part


def _expand(pattern: str) -> list[Path]:
    path = in_home(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise ConfigError(f"no file matches {pattern}", hint="name a JSONL file or a glob in quotes")
    return files
