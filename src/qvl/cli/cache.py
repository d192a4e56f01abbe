"""`qvl cache`: list and show cached answers, explain key differences, and delete entries."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from qvl._printable import plain
from qvl.cli import options
from qvl.cli.terminal import json_line, print_json
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.caches.base import Cache, CacheEntry
    from qvl.types import JsonMapping

app = typer.Typer(no_args_is_help=True, help="Look into the cache of answers, or clear it.")
CacheUrl: TypeAlias = Annotated[
    str | None, typer.Option("--cache", help="Which cache; default: QVL_CACHE, else the one in the cache folder.")
]
Key: TypeAlias = Annotated[str, typer.Argument(help="A key, or its first characters.")]
SHORT: Final = 12
PICTURE: Final = 8
# How many keys an error names.
SOME: Final = 4
RECENT: Final = 64
PREFIX: Final = "sha256-"


def register(root: typer.Typer) -> None:
    """Add the group to `root`."""
    root.add_typer(app, name="cache")


@app.command()
def stats(cache: CacheUrl = None, as_json: options.JsonOnly = False) -> None:
    """Show the size of the cache: entries, bytes, and entries by model, language and task."""
    with _opened(cache) as store:
        kept = store.stats()
        counts = store.count_by("model", "language", "task")
        url = store.url
    by_name = {name: {value or "-": number for value, number in by.items()} for name, by in counts.items()}
    if as_json:
        data = {"cache": url, "entries": kept.entries, "size_bytes": kept.size_bytes}
        print_json(data | {f"by_{name}": by_value for name, by_value in by_name.items()})
        return
    rows = [("cache", url), ("entries", str(kept.entries)), ("size", _size(kept.size_bytes))]
    for name, by_value in by_name.items():
        rows += [(name, f"{value}: {number}") for value, number in by_value.items()]
    _table(("what", "value"), rows)


@app.command("list")
def list_(
    cache: CacheUrl = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, newest first.")] = 50,
    language: Annotated[str | None, typer.Option(help="Of this language only.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model only.")] = None,
    task: Annotated[str | None, typer.Option(help="analyze or chat only.")] = None,
    as_json: options.JsonOnly = False,
) -> None:
    """List the newest answers: key, age, question, picture, model and answer.

    A picture is identified by the first digits of its sha256 (`sha256sum FILE`).
    """
    with _opened(cache) as store:
        entries = store.find(language=language, model=model, task=task, limit=limit)
    if as_json:
        for key, entry in entries:
            print_json({"key": key, **_summary(entry)})
        return
    rows = []
    for key, entry in entries:
        question, answer = _line(_question(entry)), _line(_answer(entry))
        rows.append((_short(key), _age(entry.created_at), question, _pictures(entry), entry.model, answer))
    _table(("key", "age", "question", "picture", "model", "answer"), rows)


@app.command()
def show(key: Key, cache: CacheUrl = None, as_json: options.JsonOnly = False) -> None:
    """Show one cached answer with its request and all metadata."""
    with _opened(cache) as store:
        key, entry = _find(store, key)
    if as_json:
        print_json({"key": key, **json.loads(entry.to_json())})
        return
    facts = {**_summary(entry), "created_at": _date(entry.created_at), "expires_at": _date(entry.expires_at)}
    rows = [(name, str(value)) for name, value in facts.items() if value and name not in ("text", "analysis")]
    _table(("what", "value"), [("key", key), *rows, *_request(entry.manifest)])
    typer.echo(json_line(entry.analysis, indent=2) if entry.analysis else plain(entry.text))


@app.command()
def explain(
    a: Annotated[str | None, typer.Argument(help="A key, or its first characters; default: the two newest.")] = None,
    b: Annotated[str | None, typer.Argument(help="The other one.")] = None,
    cache: CacheUrl = None,
    as_json: options.JsonOnly = False,
) -> None:
    """Show which parts of two requests differ, and so gave them different cache keys."""
    from qvl.caches import key as keys

    with _opened(cache) as store:
        first, second = _two(store, a, b)
    differences = keys.explain(first[1].manifest, second[1].manifest)
    if as_json:
        rows = [{"field": field, "a": a, "b": b} for field, a, b in differences]
        print_json({"a": first[0], "b": second[0], "differences": rows})
        return
    if not differences:
        typer.echo("no difference: both keys are the same")
        return
    columns = ("field", _short(first[0]), _short(second[0]))
    _table(columns, [(field, _value(a), _value(b)) for field, a, b in differences])


@app.command()
def clear(
    cache: CacheUrl = None,
    language: Annotated[str | None, typer.Option(help="Only answers in this language.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    task: Annotated[str | None, typer.Option(help="Only analyze or chat.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Only older ones: 90s, 15m, 36h, 7d, 2w.")] = None,
    as_json: options.JsonOnly = False,
) -> None:
    """Delete the answers that match every filter; without a filter, all of them."""
    from qvl.cli import parse_args

    age = parse_args.duration(older_than) if older_than is not None else None
    with _opened(cache) as store:
        deleted = store.clear(language=language, model=model, task=task, older_than=age)
    if as_json:
        print_json({"deleted": deleted})
    else:
        typer.echo(f"deleted {deleted} answer{'' if deleted == 1 else 's'}")


@app.command()
def path(cache: CacheUrl = None) -> None:
    """Print the path of the SQLite file, or the URL of another store."""
    with _named(cache) as store:
        typer.echo(str(getattr(store, "path", store.url)))


def _named(url: str | None) -> Cache:
    from qvl import config
    from qvl.caches.open import open_cache
    from qvl.plugins.host import PluginHost

    options.start_logs(verbose=False)
    store = open_cache(config.load(cache=url).cache, PluginHost().caches)
    if store is None:
        raise ConfigError("the cache is off", hint="name one with --cache or QVL_CACHE")
    return store


@contextmanager
def _opened(url: str | None) -> Iterator[Cache]:
    """Open the cache without creating its file: a missing default file counts as an empty cache.

    Raises:
        ConfigError: the file given on the command line does not exist.
    """
    with _named(url) as store:
        file: Path | None = getattr(store, "path", None)
        if file is None or file.exists():
            yield store
            return
        if url is not None:
            raise ConfigError(f"no cache at {file}", hint=f"the first answer creates it: qvl analyze … --cache {url}")
        from qvl.caches.memory import MemoryCache

        empty = MemoryCache()
        empty.url = store.url
        yield empty


def _find(store: Cache, start: str) -> tuple[str, CacheEntry]:
    """Return (key, entry) of the key that starts with `start`, with or without the prefix of the algorithm.

    Raises:
        ConfigError: no key, or several, start with it.
    """
    entries = store.find(prefix=start if start.startswith(PREFIX) else PREFIX + start, limit=SOME + 1)
    if len(entries) == 1:
        return entries[0]
    if not entries:
        raise ConfigError(f"no cached key starts with {start!r}", hint="see qvl cache list")
    examples = ", ".join(_short(key) for key, _ in entries[:SOME])
    several = "many" if len(entries) > SOME else len(entries)
    raise ConfigError(f"{several} keys start with {start!r}: {examples}", hint="write more digits of the key")


def _two(store: Cache, a: str | None, b: str | None) -> tuple[tuple[str, CacheEntry], tuple[str, CacheEntry]]:
    """Return the entries of two keys, or the two newest with the older one first.

    Raises:
        ConfigError: only one key is given, a key is invalid as in `_find`, or there are fewer than two entries.
    """
    if a is not None and b is not None:
        return _find(store, a), _find(store, b)
    if a is not None:
        raise ConfigError("two keys are needed, got one", hint="two keys, or none for the two newest answers")
    # What a server keeps for conversations is not an answer with a key to explain.
    newest = [found for found in store.find(limit=RECENT) if found[1].manifest][:2]
    if len(newest) < 2:
        raise ConfigError(f"the cache {store.url} has fewer than two answers to compare", hint="see qvl cache list")
    return newest[1], newest[0]


def _question(entry: CacheEntry) -> str:
    """Return a short form of the question: task and language, or the last text of the user."""
    if entry.task != "chat":
        return f"{entry.task} ({entry.language})" if entry.language else entry.task
    messages = [message for message in entry.manifest.get("messages", ()) if message.get("role") == "user"]
    texts = [part["text"] for message in messages for part in message.get("parts", ()) if "text" in part]
    return texts[-1] if texts else entry.task


def _answer(entry: CacheEntry) -> str:
    """Return a short form of the answer: only the values of a product analysis."""
    analysis = entry.analysis or {}
    attributes = analysis.get("attributes")
    if not isinstance(attributes, Mapping):
        return entry.text
    values = [analysis.get("brand"), analysis.get("category"), *(f"{name} {text}" for name, text in attributes.items())]
    return ", ".join(str(value) for value in values if value)


def _pictures(entry: CacheEntry) -> str:
    """Return the first digits of every picture's sha256, in order."""
    parts = [part for message in entry.manifest.get("messages", ()) for part in message.get("parts", ())]
    return " ".join(part["image"].partition(":")[2][:PICTURE] for part in parts if "image" in part)


def _request(manifest: JsonMapping) -> list[tuple[str, str]]:
    """Return (label, text) rows of a request: every message, and the sampling parameters that are not default."""
    rows = []
    for message in manifest.get("messages", ()):
        lines = []
        for part in message.get("parts", ()):
            picture = part.get("image")
            lines.append(
                part["text"] if "text" in part else f"[picture {_value(picture)}]" if picture else _value(part)
            )
        rows.append((str(message.get("role", "message")), "\n".join(lines)))
    sampling = {name: value for name, value in (manifest.get("sampling") or {}).items() if value not in (None, [])}
    others = {"sampling": sampling, **{name: manifest.get(name) for name in ("max_pixels", "tools", "extra")}}
    return rows + [(name, _value(value)) for name, value in others.items() if value]


def _summary(entry: CacheEntry) -> dict[str, object]:
    names = ("task", "language", "model", "namespace", "image_hash", "text", "analysis", "created_at", "expires_at")
    return {name: getattr(entry, name) for name in names}


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stdout().print(table)


def _short(key: str) -> str:
    return key.removeprefix(PREFIX)[:SHORT]


def _line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 60 else f"{flat[:59]}…"


def _value(value: object) -> str:
    """Return a value as text for a table cell; `--json` prints it in full."""
    if value is None:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:159]}…"


def _date(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _age(created_at: float) -> str:
    seconds = max(0.0, time.time() - created_at)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
