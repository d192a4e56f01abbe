"""How to see that the bundled model sees, for the backend contract."""

from __future__ import annotations

from qvl import media
from qvl.testing import Sight
from qvl.tiny import render


def sight() -> Sight:
    """Two product pictures; the answer names the colour of the first, which tells their order."""
    colours = ("red", "blue")
    products = {name: render.DrawnProduct(category="mug", color=name, brand="NORVIK", count=1) for name in colours}

    def names_in(text: str) -> list[str]:
        said = [name for name in colours if name in text]
        return [*said, *(name for name in colours if name not in said)] if len(said) == 1 else said

    pictures = {name: media.load(render.draw(product, seed=7)) for name, product in products.items()}
    return Sight(pictures, "What colour is the first?", names_in)
