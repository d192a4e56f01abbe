"""Training pictures: drawn once, resized like the image processor does, and stored as uint8 arrays on disk.

A store holds one memory map per picture grid, so a batch of one grid is a slice without padding.
Seeds start at `FIRST_TRAINING_SEED`; evaluation and tests use smaller ones.
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from qvl.tiny import FIRST_TRAINING_SEED
from qvl.tiny.render import BRANDS, CATEGORIES, COLORS, DrawnProduct, draw, sample_product

if TYPE_CHECKING:
    from numpy.typing import NDArray

FACTOR: Final = 32
MIN_PIXELS: Final = 12_288
MAX_PIXELS: Final = 16_384
SHIFT: Final = 3

# Heads of the auxiliary loss, and how many classes each tells apart (the last one of three means "none").
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
    brand = len(BRANDS) if product.brand is None else BRANDS.index(product.brand)
    return brand, CATEGORIES.index(product.category), list(COLORS).index(product.color), product.count


def decode(classes: NDArray[np.uint8]) -> DrawnProduct | None:
    """Return the product of class indices, the inverse of `encode`."""
    brand, category, color, count = (int(value) for value in classes)
    if category == len(CATEGORIES):
        return None
    return DrawnProduct(
        None if brand == len(BRANDS) else BRANDS[brand], CATEGORIES[category], list(COLORS)[color], count
    )


class PictureStore:
    """A folder of `capacity` pictures; one process draws them with `fill`, others read the finished ones."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder = folder
        self._rooms = [max(64, int(capacity * bucket.share)) for bucket in BUCKETS]
        folder.mkdir(parents=True, exist_ok=True)
        self._pixels = [self._map(f"pixels{i}", (room, b.height, b.width, 3)) for i, (room, b) in self._numbered()]
        self._classes = [self._map(f"classes{i}", (room, len(FIELDS))) for i, (room, _) in self._numbered()]
        self._done = self._map("done", (len(BUCKETS),), np.int64)

    def _numbered(self) -> list[tuple[int, tuple[int, Bucket]]]:
        return list(enumerate(zip(self._rooms, BUCKETS, strict=True)))

    def _map(self, name: str, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray[np.uint8]:
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
        product = sample_product(dice)
        image = draw(product, seed, native).resize((shape.width, shape.height), Image.Resampling.BICUBIC)
        self._pixels[bucket][position] = np.asarray(image)
        self._classes[bucket][position] = encode(product)
        self._done[bucket] = position + 1

    def take(self, bucket: int, count: int, dice: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return `count` random pictures: uint8 [count, height, width, 3] and classes [count, 4].

        Every picture is shifted randomly by up to three pixels, as augmentation.
        """
        rows = np.sort(dice.integers(0, self.ready(bucket), count))
        pixels = np.ascontiguousarray(self._pixels[bucket][rows])
        for position, (down, right) in enumerate(dice.integers(-SHIFT, SHIFT + 1, (count, 2))):
            pixels[position] = _shifted(pixels[position], int(down), int(right))
        return pixels, np.ascontiguousarray(self._classes[bucket][rows])


def _shifted(picture: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    padded = np.pad(picture, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    height, width, _ = picture.shape
    return padded[SHIFT - down : SHIFT - down + height, SHIFT - right : SHIFT - right + width]
