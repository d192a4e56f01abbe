"""Makes drawn pictures harder to read, by a seed: noise, things in the way, and brands that no training ever showed.

What is behind an occlusion stays in the labels: a reader that cannot see it should say that it is not sure.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

_NOISE_CELLS: Final = 128
"""Cells of noise along the longer side: as coarse as the picture that a reader sees after its resizing."""
_MOST_NOISE: Final = 150
_MOST_THINGS: Final = 4
_CONSONANTS: Final = "BCDFGHJKLMNPQRSTVWXZ"
_VOWELS: Final = "AEIOUY"
_LETTERS_APART: Final = 3


def unknown_brand(dice: random.Random, known: Collection[str]) -> str:
    """Return a word of five or six letters in which at least three stand otherwise than in each of `known`."""
    while True:
        word = "".join(dice.choice((_CONSONANTS, _VOWELS)[place % 2]) for place in range(dice.choice((5, 6))))
        if all(_letters_apart(word, brand) >= _LETTERS_APART for brand in known):
            return word


def make_harder(image: Image.Image, seed: int, difficulty: float) -> Image.Image:
    """Return `image` with noise over it and up to four things in front of it, from a `seed`.

    `difficulty` is from 0 (the same picture) to 1; how much of each there is lies between none and that.

    Raises:
        ValueError: a difficulty outside 0 to 1.
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"invalid difficulty {difficulty}: must be 0 to 1")
    if not difficulty:
        return image
    dice = random.Random(f"harder-{seed}")
    noise, hidden = dice.uniform(0, difficulty), dice.uniform(0, difficulty)
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    side = min(image.size)
    for _ in range(round(hidden * _MOST_THINGS)):
        width, height = (side * dice.uniform(0.06, 0.1 + 0.3 * hidden) for _ in range(2))
        left, top = dice.uniform(0, image.width) - width / 2, dice.uniform(0, image.height) - height / 2
        paint = canvas.rectangle if dice.random() < 0.5 else canvas.ellipse
        paint((left, top, left + width, top + height), fill=tuple(dice.randint(40, 220) for _ in range(3)))
    return _noisy(image, dice, noise * _MOST_NOISE)


def _noisy(image: Image.Image, dice: random.Random, strength: float) -> Image.Image:
    cells = [max(1, round(_NOISE_CELLS * length / max(image.size))) for length in image.size]
    grains = np.frombuffer(dice.randbytes(cells[0] * cells[1] * 3), dtype=np.uint8).reshape(cells[1], cells[0], 3)
    coarse = np.asarray(Image.fromarray(grains).resize(image.size, Image.Resampling.NEAREST), dtype=np.int32)
    added = (coarse - 128) * round(strength) // 128
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int32) + added, 0, 255).astype(np.uint8))


def _letters_apart(word: str, other: str) -> int:
    return sum(a != b for a, b in zip(word.ljust(6), other.ljust(6), strict=False))
