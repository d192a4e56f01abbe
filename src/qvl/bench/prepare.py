"""Preparation of request bodies from items, before their time counts. An unreadable picture fails its item."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.bench.apis import BenchApi
from qvl.bench.dataset import DRAWN, Item
from qvl.config import in_home
from qvl.errors import MediaError
from qvl.media import gate
from qvl.media.document_head import looks_like_document
from qvl.media.load_document import load_document
from qvl.media.page_choice import apart
from qvl.media.policy import MediaPolicy
from qvl.types import JsonObject

if TYPE_CHECKING:
    from qvl.media.picture import Picture

KEPT_BYTES: Final = 256 * 2**20
TOKEN_EDGE: Final = 32
"""Qwen3-VL makes one token of 32 x 32 pixels."""
Shown: TypeAlias = tuple[tuple[int, str, int], ...]
"""The pictures of one name: (number of the page or 0, data: URL, Qwen3-VL's tokens) of each."""


@dataclass(frozen=True, slots=True)
class PreparedBody:
    """A request body without its model, or the error that prevented it.

    `pixel_tokens` is the number of Qwen3-VL's tokens for the pictures of known size.
    """

    item: Item
    tail: bytes = b""
    pictures: int = 0
    pixel_tokens: int = 0
    error: str | None = None

    def body(self, model: str) -> bytes:
        """Return the JSON body for one endpoint's model."""
        return b'{"model":' + json.dumps(model).encode() + b"," + self.tail


class Preparer:
    """Makes request bodies; caches up to 256 MiB of encoded pictures, so that a repeated set is read once.

    Args:
        api: the API that is asked, with the fields of every request.
        policy: the media policy: which pictures may be read, and their limits.
    """

    def __init__(self, api: BenchApi, policy: MediaPolicy | None = None) -> None:
        self.api = api
        self.policy = policy or MediaPolicy()
        self._kept: OrderedDict[str, Shown] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def at_once(self, item: Item) -> bool:
        """True if `prepare` needs no I/O: there is no picture to read."""
        return all(_remote(name) or self._key(item, name) in self._kept for name in _names(item))

    def prepare(self, item: Item) -> PreparedBody:
        """Return the body; safe to call from several threads."""
        pictures = tokens = 0
        sent: dict[str, Shown] = {}
        for name in _names(item):
            if _remote(name):
                pictures += 1
                continue
            try:
                shown = sent[name] = self._shown(item, name)
            except MediaError as exc:
                return PreparedBody(item, pictures=pictures + 1, error=str(exc))
            pictures += len(shown)
            tokens += sum(made for _, _, made in shown)
        messages = [_with_pictures(message, sent) for message in item.messages] if sent else item.messages
        body = self.api.body(messages, item.params)
        return PreparedBody(item, json.dumps(body, ensure_ascii=False).encode()[1:], pictures, tokens)

    def _key(self, item: Item, name: str) -> str:
        return name if name.startswith((DRAWN, "data:")) else str(_path(item, name))

    def _shown(self, item: Item, name: str) -> Shown:
        key = self._key(item, name)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        if not name.strip():
            raise MediaError(f"{item.where}: empty picture name")
        made = tuple(
            (number, picture.data_url(), round(picture.width / TOKEN_EDGE) * round(picture.height / TOKEN_EDGE))
            for number, picture in self._pictures(key, name)
        )
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += _size(made)
            while self._bytes > KEPT_BYTES:
                _, old = self._kept.popitem(last=False)
                self._bytes -= _size(old)
        return made

    def _pictures(self, key: str, name: str) -> list[tuple[int, Picture]]:
        """Return the pictures of one name, each with 0; of a document its pages, each with its number."""
        if name.startswith(DRAWN):
            return [(0, _drawn(name))]
        if not looks_like_document(apart(key)[0]):
            return [(0, gate.load(key, self.policy))]
        document = load_document(key, self.policy)
        several = document.count > 1
        return [(number * several, page) for number, page in zip(document.numbers, document.pages, strict=True)]


class Feeder:
    """A queue of requests prepared in advance, in order. `starved` is how long clients waited, in seconds."""

    def __init__(self, items: Iterator[Item], preparer: Preparer, ahead: int) -> None:
        self._items = items
        self._preparer = preparer
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="bench-prepare")
        self._waiting: deque[PreparedBody | asyncio.Future[PreparedBody]] = deque()
        self.starved = 0.0

    async def fill(self) -> None:
        """Wait until the queue is full; called before the clock starts."""
        self._top_up()
        await asyncio.gather(*(body for body in self._waiting if isinstance(body, asyncio.Future)))

    async def take(self) -> PreparedBody | None:
        """Return the next request, or None at the end."""
        if not self._waiting:
            self._top_up()
        if not self._waiting:
            return None
        body = self._waiting.popleft()
        self._top_up()
        if isinstance(body, PreparedBody):
            return body
        if body.done():
            return body.result()
        since = perf_counter()
        try:
            return await body
        finally:
            self.starved += perf_counter() - since

    def close(self) -> None:
        for body in self._waiting:
            if isinstance(body, asyncio.Future):
                body.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _top_up(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._waiting) < self._ahead:
            item = next(self._items, None)
            if item is None:
                return
            if self._preparer.at_once(item):
                self._waiting.append(self._preparer.prepare(item))
            else:
                self._waiting.append(loop.run_in_executor(self._threads, self._preparer.prepare, item))


def unlike(item: Item, index: int) -> Item:
    """Return `item` as warm-up request number `index`, with an id that no measured request has."""
    return replace(item, index=index, id=f"warmup-{index}", expected=None)


def _names(item: Item) -> Iterator[str]:
    return (part["image_url"]["url"] for part in item.picture_parts())


def _remote(name: str) -> bool:
    return name[:8].lower().startswith(("http://", "https://"))


def _path(item: Item, name: str) -> str | Path:
    if name[:5].lower() == "file:" or item.base is None:
        return name
    return item.base / in_home(name)


def _size(shown: Shown) -> int:
    return sum(len(url) for _, url, _ in shown)


def _with_pictures(message: JsonObject, sent: Mapping[str, Shown]) -> JsonObject:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[JsonObject] = []
    for part in content:
        if part.get("type") == "image_url" and part["image_url"]["url"] in sent:
            named = part["image_url"]
            for number, url, _ in sent[named["url"]]:
                parts += [{"type": "text", "text": f"Page {number}:"}] if number else []
                parts.append({**part, "image_url": {**named, "url": url}})
        else:
            parts.append(part)
    return {**message, "content": parts}


def _drawn(name: str) -> Picture:
    from qvl.media import pixels
    from qvl.tiny.render import sample

    seed, _, size = name.removeprefix(DRAWN).partition(":")
    width, _, height = size.partition("x")
    _, image = sample(int(seed), (int(width), int(height)))
    return gate.load(pixels.encode_jpeg(image))
