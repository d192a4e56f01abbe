"""Auxiliary heads of the stages that teach boxes: every merged token says where things are, digit by digit.

The language part writes coordinates as digits, so it reads them from tokens that tell the digits apart. The heads are
dropped afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from training.pictures import LETTERS
from training.vision_stage import Heads

if TYPE_CHECKING:
    from training.pictures import Pictures

STEPS_OF_SIDE: Final = 100
"""Coordinates are taught in hundredths of a side: multiples of 10 where the model's own unit is a thousandth."""
_NUMBERS: Final = 6
_NAMED: Final = 3


class Pointers(nn.Module):
    """The first stage's heads, one head for the brand's letters, and one for boxes over each merged token.

    A token points to three boxes: the brand's, that of the product nearest to the token, and the one around all
    products. Six numbers say each: left, top, right, bottom, and the centre's x and y.
    """

    def __init__(self, heads: Heads, width: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.letters = nn.Linear(width, LETTERS * 27)
        numbers = _NAMED * _NUMBERS
        self.tens, self.ones = nn.Linear(width, numbers * 11), nn.Linear(width, numbers * 10)
        self.value = nn.Linear(width, numbers)

    def forward(self, merged: torch.Tensor, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, and the first heads' correct counts [4] with those of letters and boxes behind."""
        loss, hits = self.heads(merged, pictures)
        letters = torch.from_numpy(pictures.letters).long().to(merged.device)
        spelt = self.letters(merged.mean(1)).view(len(merged), 27, LETTERS)
        loss = loss + nn.functional.cross_entropy(spelt, letters)
        wanted = targets(torch.from_numpy(pictures.places).to(merged.device), pictures.pixels.shape[1:3])
        there = ~wanted.isnan()
        steps = wanted.nan_to_num().mul(STEPS_OF_SIDE).round().long()
        tens = self.tens(merged).view(*wanted.shape, 11)[there]
        ones = self.ones(merged).view(*wanted.shape, 10)[there]
        off = (self.value(merged).view(wanted.shape) - wanted)[there].abs()
        loss = loss + 3.0 * nn.functional.cross_entropy(tens, steps[there] // 10)
        loss = loss + 2.0 * nn.functional.cross_entropy(ones, steps[there] % 10) + 10.0 * off.mean()
        exact = (tens.argmax(-1) == steps[there] // 10) & (ones.argmax(-1) == steps[there] % 10)
        count = float(len(merged))
        words = (spelt.argmax(1) == letters).all(-1).sum()
        return loss, torch.cat((hits, torch.stack((words.float(), exact.float().mean() * count, off.mean() * count))))


def targets(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return what each token points to, [n, tokens, 18] as shares of a side, of places [n, 5, 4] on `size` pixels."""
    rows, columns = size[0] // 32, size[1] // 32
    down, right = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    tokens = torch.stack((right.flatten() / columns, down.flatten() / rows), -1)
    products = places[:, 1:]
    centres = (products[..., :2] + products[..., 2:]) / 2
    far = (centres[:, None] - tokens[None, :, None]).square().sum(-1).nan_to_num(torch.inf)
    nearest = torch.take_along_dim(products, far.argmin(-1)[..., None], 1)
    around = torch.cat(
        (products[..., :2].nan_to_num(2.0).amin(1), products[..., 2:].nan_to_num(-1.0).amax(1)), -1
    ).where(~products[:, 0].isnan(), torch.nan)
    boxes = torch.stack((places[:, :1].expand(nearest.shape), nearest, around[:, None].expand(nearest.shape)), 2)
    return torch.cat((boxes, (boxes[..., :2] + boxes[..., 2:]) / 2), -1).flatten(2)
