"""`qvl agent`: look at a product, find what is like it, recommend."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import options as o
from qvl.errors import ConfigError, QvlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.agent.catalog import Catalog
    from qvl.agent.steps import Recommendation
    from qvl.agent.workflow import Recommender
    from qvl.pipeline import AsyncPipeline


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("agent")(agent)


def agent(
    picture: Annotated[str | None, typer.Option("--file", "-f", help="The picture: a file or a URL.")] = None,
    wish: Annotated[str, typer.Option("--query", "-q", help='The wish: "in blue, under 100".')] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Talk: follow-up wishes, one a line.")] = False,
    search: Annotated[str | None, typer.Option("--search", help="Search the catalogue only, without a model.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List the catalogue.")] = False,
    catalog: Annotated[
        Path | None, typer.Option("--catalog", "-c", help="JSON, JSONL or CSV; default: QVL_CATALOG, else a sample.")
    ] = None,
    index: Annotated[Path | None, typer.Option("--index", help="Keep the index in this SQLite file.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=50, help="How many products.")] = 5,
    max_price: Annotated[float | None, typer.Option("--max-price", help="With --search: at most.")] = None,
    checkpoints: Annotated[Path | None, typer.Option("--checkpoints", help="Keep threads in this file.")] = None,
    thread: Annotated[str | None, typer.Option("--thread", help="Go on with this thread.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Let no model write the answer.")] = False,
    language: Annotated[str | None, typer.Option("--language", "-l", help="Of the analysis: en, zh, pt, es.")] = None,
    model: o.Model = None,
    device: o.Device = None,
    base_url: o.BaseUrl = None,
    option: o.BackendOption = None,
    cache: o.CacheUrl = None,
    max_pixels: o.MaxPixels = None,
    allow_private: o.AllowPrivate = None,
    iterations: o.Iterations = 1,
    as_json: o.AsJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the chain of calls as a page.")] = None,
    verbose: o.Verbose = False,
) -> None:
    """Look at a product picture, search the catalogue, and recommend; always in this order.

    The chain of calls is shown as it happens. VISION_MODEL_URL, VISION_API_KEY and VISION_MODEL_NAME name an endpoint
    where no --model does. Exit code: 0 done, 1 failed, 2 wrong use.
    """
    o.start_logs(verbose, as_json)
    if sum((picture is not None or chat, search is not None, everything)) != 1 and not (thread and wish):
        raise ConfigError("nothing to do, or too much", hint="one of -f PICTURE, --chat, --search WORDS, --all")
    with open_catalog(catalog, index) as shop:
        if search is not None or everything:
            _list(shop, search, limit, max_price, as_json)
            return
        chosen, urls, more = _endpoint(model, base_url or (), option or ())
        settings = o.PipelineOptions(
            model=chosen,
            cache=cache,
            language=language,
            device=device,
            base_url=urls,
            options=more,
            max_pixels=max_pixels,
            allow_private=allow_private or (),
        )
        from qvl.agent.workflow import Recommender

        pipeline = settings.build()
        recommender = Recommender(
            pipeline, shop, limit=limit, writes=False if template else None, checkpoints=checkpoints
        )
        try:
            ok = asyncio.run(
                _session(pipeline, _Show(recommender, as_json, html), picture, wish, thread, iterations, chat)
            )
        finally:
            recommender.close()
    if not ok:
        raise typer.Exit(1)


def open_catalog(path: Path | None, index: Path | None) -> Catalog:
    """The catalogue that is named, or the sample; rows that are left out are said on stderr."""
    from qvl.agent.catalog import Catalog, sample_path
    from qvl.cli import failure

    named = path or (Path(os.environ["QVL_CATALOG"]) if os.environ.get("QVL_CATALOG") else None)
    if named is None:
        print("qvl: no catalogue named, using the sample: --catalog or QVL_CATALOG names yours", file=sys.stderr)
    found = Catalog(named or sample_path(), index=index)
    problems = found.problems
    for problem in problems[:5]:
        failure.stderr().print(f"{found.path}: {problem}", style="yellow")
    if len(problems) > 5:
        failure.stderr().print(f"{found.path}: {len(problems) - 5} more rows left out", style="yellow")
    return found


def _endpoint(
    model: str | None, base_url: Sequence[str], options: Sequence[str]
) -> tuple[str | None, Sequence[str], Sequence[str]]:
    """(model, URLs, options), from the variables of older scripts where the command line names no model."""
    url, name, secret = (os.environ.get(f"VISION_{part}", "") for part in ("MODEL_URL", "MODEL_NAME", "API_KEY"))
    if model or base_url or not (url or name):
        return model, base_url, options
    if not url:
        return name, base_url, options
    if not name:
        raise ConfigError("VISION_MODEL_URL is set, but VISION_MODEL_NAME is not", hint="set it to the model's name")
    base = url.rstrip("/").removesuffix("/chat/completions")
    key = [f"api_key={json.dumps(secret)}"] if secret else []
    return f"openai:{name}", [base], [*options, *key]


def _list(shop: Catalog, search: str | None, limit: int, max_price: float | None, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from qvl.cli import failure, show

    if search is None:
        rows = [(item, "") for item in shop.all()]
    else:
        found = shop.search(search, limit=limit, max_price=max_price)
        rows = [(hit.product, ", ".join(hit.why)) for hit in found.hits]
        for note in found.notes:
            failure.stderr().print(note, style="yellow")
        if not rows and not as_json:
            show.stdout().print(f"nothing found among {len(shop)} products")
    if as_json:
        for item, why in rows:
            sys.stdout.write(json.dumps({**item.to_json(), **({"why": why} if why else {})}, ensure_ascii=False) + "\n")
        return
    if not rows:
        return
    table = Table()
    for column in ("id", "name", "brand", "category", "attributes", "price", *(("why",) if search is not None else ())):
        table.add_column(column, overflow="fold", justify="right" if column == "price" else "left")
    for item, why in rows:
        attributes = ", ".join(item.attributes.values())
        cells = [item.id, item.name, item.brand or "", item.category or "", attributes, item.price_text, why]
        table.add_row(*(Text(cell) for cell in cells[: len(table.columns)]))
    show.stdout().print(table)


class _Show:
    """Runs the recommender and shows what it does."""

    def __init__(self, recommender: Recommender, as_json: bool, html: Path | None) -> None:
        self.recommender = recommender
        self.as_json = as_json
        self.html = html

    async def run(self, picture: str | None, wish: str, thread: str | None) -> tuple[Recommendation, float]:
        """The recommendation and its seconds; a failed step is reported and its recommendation returned."""
        from rich.live import Live

        from qvl.agent.steps import StepError
        from qvl.agent.trace import Trace
        from qvl.cli import failure, show

        trace = Trace(wish, picture or "")
        console = show.stdout()
        # Without a terminal there is nothing to draw anew: the tree is printed once, at the end.
        live = Live(trace.tree(), console=console, auto_refresh=False) if console.is_terminal else None
        live = None if self.as_json else live
        began = time.perf_counter()

        def seen(event: Any) -> None:
            trace.add(event)
            if live is not None:
                live.update(trace.tree(), refresh=True)
            elif self.as_json:
                sys.stdout.write(json.dumps({"event": event.to_json()}, ensure_ascii=False) + "\n")

        with live if live is not None else nullcontext():
            try:
                found = await self.recommender.arecommend(picture, wish, thread=thread, on_event=seen)
            except StepError as exc:
                failure.report(exc)
                found = exc.recommendation
        seconds = time.perf_counter() - began
        if live is None and not self.as_json:
            console.print(trace.tree())
        self._end(found, seconds)
        if self.html is not None:
            try:
                self.html.write_text(trace.to_html(found, picture), encoding="utf-8")
            except OSError as exc:
                raise ConfigError(f"--html {self.html} cannot be written: {exc.strerror}") from exc
        return found, seconds

    def _end(self, found: Recommendation, seconds: float) -> None:
        from rich.text import Text

        from qvl.cli import show

        if self.as_json:
            line = {"recommendation": found.to_json(), "seconds": round(seconds, 6)}
            sys.stdout.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            return
        console = show.stdout()
        if found.failed and found.analysis:
            console.print(Text(f"kept: {json.dumps(dict(found.analysis), ensure_ascii=False)}"))
        if found.text:
            console.print(Text(found.text))
        for note in found.notes:
            console.print(Text(f"note: {note}", style="yellow"))


async def _session(
    pipeline: AsyncPipeline,
    shown: _Show,
    picture: str | None,
    wish: str,
    thread: str | None,
    iterations: int,
    chat: bool,
) -> bool:
    """Every iteration, then the conversation; whether all went well."""
    try:
        times: list[float] = []
        ok = True
        if picture is not None or not chat:
            for number in range(iterations):
                found, seconds = await shown.run(picture, wish, thread)
                thread = found.thread if chat or thread else None
                ok = ok and not found.failed
                times.append(seconds)
                if iterations > 1 and not shown.as_json:
                    faster = f", {times[0] / seconds:.0f} x faster than the first" if number else ""
                    print(f"run {number + 1}: {seconds * 1000:.1f} ms{faster}")
        if chat:
            await _talk(shown, thread)
        return ok
    finally:
        await pipeline.aclose()


async def _talk(shown: _Show, thread: str | None) -> None:
    """Lines from stdin: a wish, or a picture's path or URL to look at."""
    import uuid

    from qvl.cli import failure

    thread = thread or uuid.uuid4().hex
    prompt = "wish, picture, or nothing to end> " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", flush=True, file=sys.stderr)
        line = (await asyncio.to_thread(sys.stdin.readline)).strip()
        if not line:
            return
        is_picture = line.startswith(("http://", "https://", "data:")) or os.path.isfile(line)  # noqa: ASYNC240
        try:
            await shown.run(line if is_picture else None, "" if is_picture else line, thread)
        except QvlError as exc:
            failure.report(exc)
