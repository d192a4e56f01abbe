"""Search time in a catalogue of a million products.

    python benchmarks/bench_catalog.py [--products 1000000] [--folder FOLDER]

Writes a synthetic catalogue, indexes it, opens it again, and searches it by analyses, wishes, words and Chinese text.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qvl.agent.catalog.catalog import Catalog
from qvl.agent.catalog.product import Query
from qvl.tiny.render import BRANDS, CATEGORIES, CATEGORY_NAMES, COLOR_NAMES, COLORS

_SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu"
_STYLES = "classic modern light sturdy compact travel garden studio winter summer evening sport junior senior"
SYLLABLES, STYLES = _SYLLABLES.split(), _STYLES.split()


def words(dice: random.Random, number: int) -> list[str]:
    """Made-up words, short ones far more often than long ones."""
    return ["".join(dice.choices(SYLLABLES, k=dice.choice((2, 2, 3, 3, 3, 4)))) for _ in range(number)]


def write(path: Path, products: int) -> None:
    dice = random.Random(7)
    colours = tuple(COLORS)
    with path.open("w", encoding="utf-8") as file:
        for number in range(products):
            brand, category, color = dice.choice(BRANDS), dice.choice(CATEGORIES), dice.choice(colours)
            style, extra = dice.choice(STYLES), words(dice, 3)
            row = {
                "id": f"P{number:07}",
                "name": f"{brand.title()} {style} {category} {' '.join(extra)}",
                "brand": brand,
                "category": category,
                "price": round(dice.lognormvariate(3.5, 0.8), 2),
                "attributes": {"color": color, "style": style, "size": str(dice.randint(1, 12))},
                "name_zh": COLOR_NAMES["zh"][color] + CATEGORY_NAMES["zh"][category],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def queries(dice: random.Random, number: int) -> Iterator[tuple[str, Query]]:
    colours = tuple(COLORS)
    for _ in range(number):
        brand, category, color = dice.choice(BRANDS), dice.choice(CATEGORIES), dice.choice(colours)
        yield "analysis", Query(brand=brand, category=category, attributes={"color": color, "count": "2"})
        yield "no brand", Query(category=category, attributes={"color": color})
        yield (
            "analysis and wish",
            Query(brand=brand, category=category, only={"color": color}, text=dice.choice(STYLES), max_price=40),
        )
        yield "one brand", Query(text=brand)
        yield "words", Query(text=f"{dice.choice(STYLES)} {color} {category} for my {words(dice, 1)[0]}")
        yield "rare word", Query(text=words(dice, 1)[0] + " " + words(dice, 1)[0])
        yield "nothing fits all", Query(brand=brand, category=category, attributes={"color": color, "size": "99"})
        yield "Chinese", Query(text=COLOR_NAMES["zh"][color] + "的" + CATEGORY_NAMES["zh"][category])
        yield "price only", Query(min_price=10, max_price=10.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        source, index = folder / "catalogue.jsonl", folder / "index.db"
        if not source.exists():
            write(source, options.products)
        began = time.perf_counter()
        catalog = Catalog(source, index=index, progress=sys.stderr.isatty())
        print(f"{len(catalog):,} products indexed in {time.perf_counter() - began:.0f} s {catalog.changes}")
        print(f"file {source.stat().st_size / 2**20:.0f} MiB, index {index.stat().st_size / 2**20:.0f} MiB")
        catalog.close()
        began = time.perf_counter()
        catalog = Catalog(source, index=index)
        print(f"opened again in {(time.perf_counter() - began) * 1000:.1f} ms")
        times: dict[str, list[float]] = {}
        for kind, query in queries(random.Random(11), options.queries):
            began = time.perf_counter()
            catalog.search(query)
            times.setdefault(kind, []).append((time.perf_counter() - began) * 1000)
        print(f"{'query':20} {'median ms':>10} {'p95 ms':>10}")
        everything = [value for group in times.values() for value in group]
        for kind, seconds in [*times.items(), ("all", everything)]:
            print(f"{kind:20} {statistics.median(seconds):10.1f} {sorted(seconds)[int(len(seconds) * 0.95)]:10.1f}")
        catalog.close()


if __name__ == "__main__":
    main()
