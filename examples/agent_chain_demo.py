"""Look, find, recommend, and see the chain of calls: what `qvl agent` does, to read.

python examples/agent_chain_demo.py [PICTURE] [WISH]
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live

from qvl import Pipeline
from qvl.agent import Catalog, Recommender
from qvl.agent.trace import Trace

HERE = Path(__file__).parent


def main(picture: str = str(HERE / "pictures" / "norvik-mug-red.png"), wish: str = "in blue, under 100") -> None:
    console = Console()
    trace = Trace(wish, picture)
    # The bundled model looks, but cannot write: the answer is from a template. Pipeline("openai:…") writes.
    with Pipeline() as pipeline, Catalog(HERE / "catalog" / "products.jsonl") as catalog:
        recommender = Recommender(pipeline, catalog, limit=3)
        with Live(trace.tree(), console=console, auto_refresh=False) as live:

            def show(event: object) -> None:
                trace.add(event)  # type: ignore[arg-type]
                live.update(trace.tree(), refresh=True)

            found = recommender.recommend(picture, wish, on_event=show)
        console.print()
        console.print(found.text)
        cheaper = recommender.recommend(None, "cheaper ones?", thread=found.thread)
        console.print(f"\nCheaper ones? (the picture is not looked at again)\n{cheaper.text}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
