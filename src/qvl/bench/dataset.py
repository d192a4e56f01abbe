"""Sources of benchmark requests: files of requests, one picture, or drawn pictures."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Final, Protocol

from qvl.bench.apis import BenchApi, NoRequestError
from qvl.bench.line_forms import PICTURE_KEYS, Messages, read_forms, user_message
from qvl.bench.read_rows import is_read, read_rows
from qvl.config import in_home
from qvl.errors import ConfigError
from qvl.types import JsonMapping, JsonObject

DRAWN: Final = "drawn:"
MOST_LISTED: Final = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One request to make, read from a line of the input.

    Args:
        index: the item's position among all items of the input, from 0.
        id: the `id` in the line, else `file:line`.
        messages: in OpenAI's format; `image_url` parts have the picture's path or URL as in the input. Empty where
            the line is a whole request of another API.
        params: the request fields that the line itself sets.
        expected: the correct answer, a text or an object; None if the line has none.
        where: the line as `file:line`, for error messages.
        base: the folder to which relative picture paths belong.
        names: those that the line has, if it is an object.
    """

    index: int
    id: str
    messages: Messages
    params: JsonMapping = field(default_factory=dict)
    expected: object = None
    where: str = ""
    base: Path | None = None
    names: tuple[str, ...] = ()

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


class Files:
    """Items of files, in every form of `read_rows` and `read_forms`; lines are not held in memory.

    Args:
        patterns: files and globs; a picture file is one item, with `prompt` as its question.
        base_dir: the folder to which relative picture paths belong; None is the file's folder.
        prompt: the question for lines and files that have a picture but no text.
        media: the fields in which a line may have its pictures.
        api: the API that is asked; None is chat. A line for which it has no form is invalid.
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
        api: BenchApi | None = None,
        strict: bool = False,
        on_bad: Callable[[BadLine], None] | None = None,
    ) -> None:
        self.media = media
        self.api = api or BenchApi()
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
            for number, value in read_rows(path):
                where = f"{path}:{number}"
                try:
                    if isinstance(value, NoRequestError):
                        raise value
                    forms = read_forms(value, self.prompt, self.media, self.api)
                except NoRequestError as exc:
                    self._note(BadLine(where, str(exc)), first)
                    continue
                names = tuple(map(str, value)) if isinstance(value, dict) else ()
                for part, (named, messages, params, expected) in enumerate(forms, 1):
                    name = (named or f"{path.name}:{number}") + (f"/{part}" if len(forms) > 1 else "")
                    base = self.base_dir or path.parent
                    yield Item(index, name, messages, params, expected, where, base, names)
                    index += 1

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
        yield Item(0, name, (user_message(self.prompt, self.pictures),), where=name, base=Path.cwd())


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
            message = user_message(self.prompt, (f"{DRAWN}{seed}:{width}x{height}",))
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


def _expand(pattern: str) -> list[Path]:
    path = in_home(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(found for found in path.iterdir() if found.is_file() and is_read(found))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise ConfigError(f"no file matches {pattern}", hint="name a file of requests, or a glob in quotes")
    return files
