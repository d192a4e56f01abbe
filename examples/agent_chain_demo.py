"""Look, find, recommend, and see the chain of calls: what `qvl agent` does, to read and to change.

python examples/agent_chain_demo.py                   the chain on a sample picture, then a follow-up question
python examples/agent_chain_demo.py -f mug.png -i 3   your picture, three times: the first asks the model, the others
                                                      are answered from the cache
python examples/agent_chain_demo.py --search NORVIK   the search alone, without a model
python examples/agent_chain_demo.py --chat            talk: pictures and wishes, one a line
python examples/agent_chain_demo.py --chat "in blue"  one wish about the picture
python examples/agent_chain_demo.py --all             all scenarios, one after the other

The bundled model looks, but cannot write: its answers are from a template. -m openai:NAME, -m Qwen/Qwen3-VL-4B-Instruct
or QVL_MODEL names one that writes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from qvl import AsyncPipeline
from qvl.agent import Catalog, Recommender
from qvl.agent.about import about_agent, asks_about_agent
from qvl.agent.catalog.product import Query
from qvl.agent.steps import Recommendation
from qvl.agent.trace import Trace
from qvl.cli.conversation import converse
from qvl.errors import ConfigError, QvlError

HERE = Path(__file__).parent
PICTURE = HERE / "pictures" / "norvik-mug-red.png"
console = Console(highlight=False, emoji=False, markup=False)


class Demo:
    """The scenarios; each prints what it shows before it shows it."""

    def __init__(self, runner: asyncio.Runner, recommender: Recommender, catalog: Catalog) -> None:
        self.runner, self.recommender, self.catalog = runner, recommender, catalog

    async def recommend(self, picture: str | None, wish: str, thread: str | None = None) -> Recommendation:
        """Run the three steps, with the tree of calls growing meanwhile, and print the answer."""
        trace = Trace(wish, picture or "")
        try:
            with Live(get_renderable=trace.tree, console=console):
                found = await self.recommender.arecommend(picture, wish, thread=thread, on_event=trace.add)
        finally:
            # Without a terminal the tree has no end of line.
            console.print()
        console.print(f"{found.text}\n")
        return found

    def chain(self, picture: str, iterations: int) -> None:
        heading(
            "The chain: analyze the picture, search the catalogue, answer. The order is fixed, so that every product "
            "in the answer is a hit of the search, with its name and price from the catalogue."
        )
        for number in range(1, iterations + 1):
            began = time.perf_counter()
            found = self.runner.run(self.recommend(picture, "in blue, under 100"))
            seconds, asked = time.perf_counter() - began, found.inferences or "no"
            console.print(f"run {number}: {seconds * 1000:.1f} ms, requests to the model: {asked}\n")
        heading("A follow-up in the same thread: the picture is not looked at again.")
        self.runner.run(self.recommend(None, "cheaper ones?", found.thread))

    def search(self, words: str) -> None:
        heading(f"The search alone, without a model: {words!r} among {len(self.catalog):,} products, each with why.")
        for hit in self.catalog.search(Query(text=words), limit=5).hits:
            console.print(f"  {hit.product.name}, {hit.product.price_text} ({', '.join(hit.why)})")

    def chat(self, picture: str, message: str) -> None:
        if message:
            heading(f"One message about {picture}: {message!r}")
            self.runner.run(self.answer([picture], message))
            return
        heading("A conversation: a picture's path or URL, wishes, `what can you do?`, quit.")
        converse(self.runner, "wish, picture, or quit> ", self.answer)

    async def answer(self, pictures: list[str], text: str) -> None:
        if asks_about_agent(text):
            console.print(about_agent(self.catalog, self.recommender.writes))
        elif pictures or self.recommender.has_picture("demo"):
            await self.recommend(pictures[0] if pictures else None, text, "demo")
        else:
            raise ConfigError("no picture yet", hint="name its path or URL; `what can you do?` tells more")


def heading(text: str) -> None:
    console.print(f"\n{text}", style="bold")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", default=str(PICTURE), help="the picture: a path or a URL")
    parser.add_argument("-i", "--iterations", type=int, default=1, help="run the chain so many times")
    parser.add_argument("-m", "--model", help="as of qvl.Pipeline; default: QVL_MODEL, else the bundled one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--chat", nargs="?", const="", metavar="MESSAGE", help="talk, or send one message")
    what.add_argument("--search", metavar="WORDS", help="search the catalogue")
    what.add_argument("--all", action="store_true", help="run all scenarios")
    options = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error("-i must be 1 or more")
    pipeline = AsyncPipeline(options.model)
    with asyncio.Runner() as runner, Catalog(HERE / "catalog" / "products.jsonl") as catalog:
        demo = Demo(runner, Recommender(pipeline, catalog, limit=3), catalog)
        try:
            if options.search is not None or options.all:
                demo.search(options.search or "NORVIK mug")
            if options.all or (options.search is None and options.chat is None):
                demo.chain(options.file, max(options.iterations, 2 if options.all else 1))
            if options.chat is not None or options.all:
                demo.chat(options.file, "what can you do?" if options.all else options.chat)
        finally:
            demo.recommender.close()
            runner.run(pipeline.aclose())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QvlError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
