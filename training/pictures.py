"""Training pictures: drawn once, resized like the image processor does, and stored as uint8 arrays on disk.

A store holds one memory map per picture grid, so a batch of one grid is a slice without padding.
Seeds start at `FIRST_TRAINING_SEED`; evaluation and tests use smaller ones.
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from qvl.tiny import FIRST_TRAINING_SEED
from qvl.tiny.harder import make_harder, unknown_brand
from qvl.tiny.render import BRANDS, CATEGORIES, COLORS, MAX_COUNT, DrawnProduct, draw_with_boxes, sample_product
from training.places import Shown, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

FACTOR: Final = 32
MIN_PIXELS: Final = 12_288
MAX_PIXELS: Final = 16_384
SHIFT: Final = 3

HARDER_SHARE: Final = 0.3
UNKNOWN_BRANDS: Final = 0.15
LETTERS: Final = 6
THINGS: Final = 1 + MAX_COUNT

# Heads of the auxiliary loss, and how many classes each tells apart (the last one of three means "none").
UNKNOWN: Final = 255
"""The class of a brand that is none of `BRANDS`: its letters say which, and no head learns it."""
FIELDS: Final = {"brand": len(BRANDS) + 1, "category": len(CATEGORIES) + 1, "color": len(COLORS) + 1, "count": 5}


@dataclass(frozen=True, slots=True)
class Bucket:
    """One picture grid: height and width in pixels after resizing, and the drawn size (width, height)."""

    height: int
    width: int
    native: tuple[int, int]
    share: float

    @property
    def merged_tokens(self) -> int:
        return self.height * self.width // FACTOR**2


BUCKETS: Final = (
    Bucket(128, 128, (256, 256), 0.52),
    Bucket(96, 128, (256, 192), 0.13),
    Bucket(128, 96, (192, 256), 0.13),
    Bucket(96, 160, (320, 180), 0.11),
    Bucket(160, 96, (180, 320), 0.11),
)


def resized(width: int, height: int) -> tuple[int, int]:
    """Return (width, height) after Qwen's smart_resize: multiples of 32, area within the checkpoint's bounds."""
    rows, columns = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if rows * columns > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        rows = max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR)
    elif rows * columns < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        rows = math.ceil(height * grow / FACTOR) * FACTOR
        columns = math.ceil(width * grow / FACTOR) * FACTOR
    return columns, rows


def encode(product: DrawnProduct | None) -> tuple[int, int, int, int]:
    """Return class indices in the order of `FIELDS`; a missing field is the last class, a missing count 0."""
    if product is None:
        return len(BRANDS), len(CATEGORIES), len(COLORS), 0
    brand = len(BRANDS) if product.brand is None else UNKNOWN
    brand = BRANDS.index(product.brand) if product.brand in BRANDS else brand
    return brand, CATEGORIES.index(product.category), list(COLORS).index(product.color), product.count


def spell(product: DrawnProduct | None) -> list[int]:
    """Return the letters of the brand as `LETTERS` numbers: 1 to 26, and 0 behind the last one."""
    word = "" if product is None else product.brand or ""
    return [ord(letter) - 64 for letter in word] + [0] * (LETTERS - len(word))


def decode(classes: NDArray[np.uint8], letters: NDArray[np.uint8]) -> DrawnProduct | None:
    """Return the product of class indices and letters, the inverse of `encode` and `spell`."""
    _, category, color, count = (int(value) for value in classes)
    if category == len(CATEGORIES):
        return None
    brand = "".join(chr(64 + int(letter)) for letter in letters if letter)
    return DrawnProduct(brand or None, CATEGORIES[category], list(COLORS)[color], count)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of one grid and what they show.

    Pixels are uint8 [n, height, width, 3], classes [n, 4] as of `encode`, letters [n, 6] as of `spell`. Places are
    float32 [n, 5, 4]: the boxes of brand and products as shares of width and height, NaN for what is not there.
    """

    pixels: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    letters: NDArray[np.uint8]
    places: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pixels)

    def shown(self) -> Iterator[Shown]:
        """Yield what each picture shows."""
        for classes, letters, places in zip(self.classes, self.letters, self.places, strict=True):
            brand, *products = (None if math.isnan(place[0]) else tuple(place) for place in places.tolist())
            yield Shown(decode(classes, letters), brand, tuple(place for place in products if place is not None))


class PictureStore:
    """A folder of `capacity` pictures; one process draws them with `fill`, others read the finished ones."""

    def __init__(self, folder: Path, capacity: int, *, harder: bool = False) -> None:
        """Open or make the store. With `harder` some pictures are noisy or hide things, and some brands are new."""
        self._folder, self._harder = folder, harder
        self._rooms = [max(64, int(capacity * bucket.share)) for bucket in BUCKETS]
        folder.mkdir(parents=True, exist_ok=True)
        self._pixels = [self._map(f"pixels{i}", (room, b.height, b.width, 3)) for i, (room, b) in self._numbered()]
        self._classes = [self._map(f"classes{i}", (room, len(FIELDS))) for i, (room, _) in self._numbered()]
        self._letters = [self._map(f"letters{i}", (room, LETTERS)) for i, (room, _) in self._numbered()]
        self._places = [self._map(f"places{i}", (room, THINGS, 4), np.float32) for i, (room, _) in self._numbered()]
        self._done = self._map("done", (len(BUCKETS),), np.int64)

    def _numbered(self) -> list[tuple[int, tuple[int, Bucket]]]:
        return list(enumerate(zip(self._rooms, BUCKETS, strict=True)))

    def _map(self, name: str, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray[Any]:
        path = self._folder / name
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as file:
                os.truncate(file.fileno(), size)
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

    def __len__(self) -> int:
        return int(self._done.sum())

    def ready(self, bucket: int) -> int:
        """Return the number of finished pictures of a bucket."""
        return int(self._done[bucket])

    def wait_for(self, pictures: int, *, timeout: float = 600.0) -> None:
        """Wait until another process has drawn `pictures`, some of every grid; raise TimeoutError after `timeout` s."""
        ends = time.monotonic() + timeout
        while len(self) < pictures or not self._done.all():
            if time.monotonic() > ends:
                raise TimeoutError(f"{len(self)} of {pictures} pictures after {timeout:g} s")
            time.sleep(0.2)

    def fill(self) -> None:
        """Draw until every bucket is full, resuming an earlier run."""
        seed = FIRST_TRAINING_SEED + 7 * len(self)
        while any(done < room for done, room in zip(self._done, self._rooms, strict=True)):
            bucket = int(np.argmin([done / room for done, room in zip(self._done, self._rooms, strict=True)]))
            self._draw(bucket, seed)
            seed += 1

    def _draw(self, bucket: int, seed: int) -> None:
        dice = random.Random(f"training-{seed}")
        shape, position = BUCKETS[bucket], int(self._done[bucket])
        scale = 2.0 if dice.random() < 0.15 else dice.uniform(0.9, 1.2)
        native = (round(shape.native[0] * scale), round(shape.native[1] * scale))
        product, difficulty = sample_product(dice), 0.0
        if self._harder:
            difficulty = dice.random() if dice.random() < HARDER_SHARE else 0.0
            if product is not None and product.brand is not None and dice.random() < UNKNOWN_BRANDS:
                product = replace(product, brand=unknown_brand(dice, BRANDS))
        drawing = draw_with_boxes(product, seed, native)
        image = make_harder(drawing.image, seed, difficulty)
        image = image.resize((shape.width, shape.height), Image.Resampling.BICUBIC)
        self._pixels[bucket][position] = np.asarray(image)
        self._classes[bucket][position] = encode(product)
        self._letters[bucket][position] = spell(product)
        shown = show(product, drawing)
        places = np.full((THINGS, 4), np.nan, np.float32)
        for row, place in enumerate((shown.brand, *shown.products)):
            if place is not None:
                places[row] = place
        self._places[bucket][position] = places
        self._done[bucket] = position + 1

    def take(self, bucket: int, count: int, dice: np.random.Generator) -> Pictures:
        """Return `count` random pictures, each shifted randomly by up to three pixels, as augmentation."""
        rows = np.sort(dice.integers(0, self.ready(bucket), count))
        taken = Pictures(
            *(
                np.ascontiguousarray(kept[bucket][rows])
                for kept in (self._pixels, self._classes, self._letters, self._places)
            )
        )
        height, width = taken.pixels.shape[1:3]
        for position, (down, right) in enumerate(dice.integers(-SHIFT, SHIFT + 1, (count, 2))):
            taken.pixels[position] = _shifted(taken.pixels[position], int(down), int(right))
            taken.places[position] += (right / width, down / height) * 2
        np.clip(taken.places, 0.0, 1.0, out=taken.places)
        return taken


def _shifted(picture: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    padded = np.pad(picture, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    height, width, _ = picture.shape
    return padded[SHIFT - down : SHIFT - down + height, SHIFT - right : SHIFT - right + width]
