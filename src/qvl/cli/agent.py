"""`qvl agent`: look at a product picture, search similar products, and recommend one."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from qvl.cli import options
from qvl.cli.expand import Without, expand
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from qvl.agent.catalog.catalog import Catalog
    from qvl.agent.catalog.product import Product

MAX_SHOWN: Final = 50
_TABLE: Final = 1000


@expand
def agent(
    *,
    picture: Annotated[str | None, typer.Option("--file", "-f", help="The picture: a file or a URL.")] = None,
    wish: Annotated[str, typer.Option("--query", "-q", help='The wish: "in blue, under 100".')] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Talk: wishes and pictures, one a line, until quit.")] = False,
    search: Annotated[str | None, typer.Option("--search", help="Search the catalogue only, without a model.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List the catalogue.")] = False,
    catalog: options.CatalogFile = None,
    index: options.IndexFile = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MAX_SHOWN, help="How many products.")] = 5,
    max_price: Annotated[float | None, typer.Option("--max-price", help="With --search: at most.")] = None,
    checkpoints: Annotated[Path | None, typer.Option("--checkpoints", help="Keep threads in this file.")] = None,
    thread: Annotated[str | None, typer.Option("--thread", help="Go on with this thread.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Let no model write the answer.")] = False,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Mark on the page of --html what was seen where.")
    ] = False,
    judge: Annotated[bool, typer.Option("--judge", help="Order by how probably each product fits the wish.")] = False,
    language: Annotated[str | None, typer.Option("--language", "-l", help="Of the analysis: en, zh, pt, es.")] = None,
    settings: Annotated[options.PipelineOptions, Without("cache_mode", "max_tokens", "param")],
    iterations: options.Iterations = 1,
    as_json: options.AsJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the chain of calls as a page.")] = None,
    verbose: options.Verbose = False,
) -> None:
    """Look at a product picture, search the catalogue, and recommend; always in this order.

    The chain of calls is shown as it happens. VISION_MODEL_URL, VISION_API_KEY and VISION_MODEL_NAME name an endpoint
    where no --model does. Exit code: 0 done, 1 failed, 2 wrong use.
    """
    options.start_logs(verbose, as_json)
    if sum((picture is not None or chat, search is not None, everything)) != 1 and not (thread and wish):
        raise ConfigError("give exactly one thing to do", hint="one of -f PICTURE, --chat, --search WORDS, --all")
    if max_price is not None and search is None:
        raise ConfigError("--max-price works only with --search", hint='or put it into the wish: -q "under 100"')
    with open_catalog(catalog, index) as shop:
        if search is not None or everything:
            _list(shop, search, limit, max_price, as_json)
            return
        from qvl.agent.workflow import Recommender
        from qvl.cli import agent_run, failure

        settings = _endpoint(settings)
        if picture is not None:
            try:
                agent_run.check_picture(picture)
            except MediaError as exc:
                failure.report(exc, picture)
                if as_json:
                    print_json({"error": failure.as_json(exc)})
                raise typer.Exit(failure.FAILED) from exc
        pipeline = settings.build(language=language)
        recommender = Recommender(
            pipeline,
            shop,
            limit=limit,
            writes=False if template else None,
            checkpoints=checkpoints,
            judge=judge,
            evidence=evidence,
        )
        try:
            presenter = agent_run.Presenter(recommender, as_json, html)
            ok = agent_run.session(pipeline, presenter, picture, wish, thread, iterations, chat)
        finally:
            recommender.close()
    if not ok:
        raise typer.Exit(1)


def open_catalog(path: Path | None, index: Path | None) -> Catalog:
    """Return the catalogue at `path`, else at QVL_CATALOG, else the sample; invalid rows are reported on stderr."""
    from qvl.agent.catalog.catalog import Catalog, sample_path
    from qvl.cli import failure

    file = path or (Path(os.environ["QVL_CATALOG"]) if os.environ.get("QVL_CATALOG") else None)
    if file is None:
        print("qvl: no catalogue named, using the sample: --catalog or QVL_CATALOG names yours", file=sys.stderr)
    catalog = Catalog(file or sample_path(), index=index)
    problems = catalog.problems
    for problem in problems[:5]:
        failure.stderr().print(f"{catalog.path}: {problem}", style="yellow")
    if len(problems) > 5:
        failure.stderr().print(f"{catalog.path}: {len(problems) - 5} more rows left out", style="yellow")
    return catalog


def _endpoint(settings: options.PipelineOptions) -> options.PipelineOptions:
    """Return `settings`; without a model, with the endpoint in the environment variables VISION_*."""
    url, name, secret = (os.environ.get(f"VISION_{part}", "") for part in ("MODEL_URL", "MODEL_NAME", "API_KEY"))
    if settings.model or settings.base_url or not (url or name):
        return settings
    if not url:
        return replace(settings, model=name)
    if not name:
        raise ConfigError("VISION_MODEL_URL is set, but VISION_MODEL_NAME is not", hint="set it to the model's name")
    base = url.rstrip("/").removesuffix("/chat/completions")
    key = [f"api_key={json.dumps(secret)}"] if secret else []
    return replace(settings, model=f"openai:{name}", base_url=[base], option=[*(settings.option or ()), *key])


def _list(shop: Catalog, search: str | None, limit: int, max_price: float | None, as_json: bool) -> None:
    from qvl.agent.catalog.product import Query
    from qvl.cli import failure
    from qvl.cli.console import stdout

    if search is None:
        _print_products(((item, "") for item in shop.all()), as_json)
        if not as_json:
            stdout().print(f"{len(shop):,} products")
        return
    query = Query(text=search, max_price=max_price)
    matches = shop.search(query, limit=limit)
    for note in matches.notes:
        failure.stderr().print(note, style="yellow")
    _print_products(((hit.product, ", ".join(hit.why)) for hit in matches.hits), as_json)
    if as_json:
        return
    if not matches.hits:
        stdout().print(f"nothing found among {len(shop):,} products")
        return
    matching = shop.count(query)
    hint = "; --limit shows more" if matching > len(matches.hits) and limit < MAX_SHOWN else ""
    stdout().print(f"{len(matches.hits)} of {matching:,} that match, of {len(shop):,} products{hint}")


def _print_products(rows: Iterator[tuple[Product, str]], as_json: bool) -> None:
    """Print (product, reasons) rows as JSON lines or as tables of up to a thousand rows."""
    from qvl.cli.console import stdout

    if as_json:
        for item, why in rows:
            print_json({**item.to_json(), **({"why": why} if why else {})})
        return
    while part := list(islice(rows, _TABLE)):
        stdout().print(_table(part))


def _table(rows: Sequence[tuple[Product, str]]) -> Table:
    """Return a table of (product, reasons); the column of reasons is omitted if all are ""."""
    from rich.table import Table
    from rich.text import Text

    searched = any(why for _, why in rows)
    table = Table()
    table.add_column("id", no_wrap=True)
    table.add_column("product", overflow="fold")
    table.add_column("price", justify="right", no_wrap=True)
    if searched:
        table.add_column("why", overflow="fold")
    for item, why in rows:
        kind = " ".join(filter(None, (item.brand, item.category)))
        about = " · ".join(filter(None, (kind, ", ".join(item.attributes.values()))))
        name = Text(item.name)
        if about:
            name.append(f"\n{about}", style="dim")
        cells = [Text(item.id), name, Text(item.price_text), Text(why)]
        table.add_row(*cells[: len(table.columns)])
    return table
