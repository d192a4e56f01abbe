"""Writes products.jsonl beside this file, and its copy in qvl: the shop that sells what the bundled model knows.

    python examples/catalog/make_catalog.py

240 products: every brand in every category, in two of the ten colours. Names have no colour and no category in them,
as in many a shop, so that finding them takes more than looking for words in names.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from qvl.agent.catalog.catalog import sample_path
from qvl.tiny.render import BRANDS, CATEGORIES, CATEGORY_NAMES, COLOR_NAMES, COLORS

SERIES = ("Alba", "Borea", "Cima", "Delta", "Estela", "Fjord", "Gala", "Hanami", "Iris", "Juno", "Kite", "Luna")
MATERIALS = {
    "mug": ("stoneware", "glass", "porcelain"),
    "shoe": ("leather", "canvas", "mesh"),
    "bottle": ("steel", "glass", "bamboo"),
    "shirt": ("cotton", "linen", "wool"),
    "bag": ("leather", "canvas", "nylon"),
    "hat": ("felt", "straw", "wool"),
    "lamp": ("brass", "paper", "oak"),
    "watch": ("steel", "ceramic", "titanium"),
    "chair": ("oak", "beech", "steel"),
    "phone": ("aluminium", "glass", "titanium"),
}
PRICES = {
    "mug": 12, "shoe": 79, "bottle": 19, "shirt": 35, "bag": 59,
    "hat": 25, "lamp": 45, "watch": 149, "chair": 119, "phone": 399,
}  # fmt: skip


def main() -> None:
    dice = random.Random(2024)
    colours = list(COLORS)
    lines = []
    for place, brand in enumerate(BRANDS):
        for row, category in enumerate(CATEGORIES):
            for copy in range(2):
                color = colours[(place + 3 * row + 5 * copy + place // 10) % len(colours)]
                material = dice.choice(MATERIALS[category])
                number = len(lines) + 1
                product = {
                    "id": f"{category[:2].upper()}-{number:04}",
                    "name": f"{brand.title()} {dice.choice(SERIES)} {dice.randint(1, 9) * 100}",
                    "brand": brand,
                    "category": category,
                    "price": round(PRICES[category] * dice.uniform(0.7, 1.6)) - 0.1,
                    "attributes": {"color": color, "material": material},
                    "url": f"https://shop.example/p/{number:04}",
                    "currency": "EUR",
                    "stock": dice.randint(0, 40),
                }
                product["title"] = {
                    "zh": f"{COLOR_NAMES['zh'][color]}{CATEGORY_NAMES['zh'][category]}",
                    "pt": f"{CATEGORY_NAMES['pt'][category]} {COLOR_NAMES['pt'][color]}",
                    "es": f"{CATEGORY_NAMES['es'][category]} {COLOR_NAMES['es'][color]}",
                }
                product |= {f"title_{language}": text for language, text in product.pop("title").items()}
                lines.append(json.dumps(product, ensure_ascii=False))
    target = Path(__file__).with_name("products.jsonl")
    for path in (target, sample_path()):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} products in {target.name}")


if __name__ == "__main__":
    main()
