"""Auxiliary heads of the stages that teach boxes: every merged token says where things are.

The heads are dropped afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from qvl.tiny.render import MAX_COUNT
from training.pictures import FACTOR, LETTERS
from training.vision_stage import Heads

if TYPE_CHECKING:
    from training.pictures import Pictures

STEPS_OF_SIDE: Final = 100
"""Coordinates are taught in hundredths of a side: multiples of 10 where the model's own unit is a thousandth."""
_NUMBERS: Final = 8


class Pointers(nn.Module):
    """The first stage's heads, one head for the brand's letters, and one for boxes over each merged token.

    A token points to two boxes, the brand's and that of the product nearest to the token: four numbers each, as steps
    of a side. A linear layer tells a hundred steps apart if the token has the number itself, which is also what the
    language part needs: it writes digit after digit. Numbers by an absolute error, or digits apart from each other,
    were learnt far more slowly. One head more says at which pixel an edge is that the token itself holds: without it,
    no box is learnt for long. The last one says which of how many products the nearest one is, so that the language
    part finds the next product's tokens.
    """

    def __init__(self, heads: Heads, width: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.letters = nn.Linear(width, LETTERS * 27)
        self.steps = nn.Linear(width, _NUMBERS * (STEPS_OF_SIDE + 1))
        self.edges = nn.Linear(width, 8 * (FACTOR + 1))
        self.turn = nn.Linear(width, MAX_COUNT * MAX_COUNT)

    def forward(self, merged: torch.Tensor, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss, and the first heads' correct counts [4] with those of letters and boxes behind."""
        loss, hits = self.heads(merged, pictures)
        letters = torch.from_numpy(pictures.letters).long().to(merged.device)
        spelt = self.letters(merged.mean(1)).view(len(merged), 27, LETTERS)
        loss = loss + nn.functional.cross_entropy(spelt, letters)
        wanted = targets(torch.from_numpy(pictures.places).to(merged.device), pictures.pixels.shape[1:3])
        there = ~wanted.isnan()
        steps = wanted.nan_to_num().mul(STEPS_OF_SIDE).round().long()
        guessed = self.steps(merged).view(*wanted.shape, STEPS_OF_SIDE + 1)[there]
        loss = loss + 6.0 * nn.functional.cross_entropy(guessed, steps[there])
        loss = loss + self._edges_loss(merged, pictures) + self._turn_loss(merged, pictures)
        off = (guessed.argmax(-1) - steps[there]).abs().float() / STEPS_OF_SIDE
        exact = off == 0
        count = float(len(merged))
        words = (spelt.argmax(1) == letters).all(-1).sum()
        return loss, torch.cat((hits, torch.stack((words.float(), exact.float().mean() * count, off.mean() * count))))

    def _edges_loss(self, merged: torch.Tensor, pictures: Pictures) -> torch.Tensor:
        wanted = edges(torch.from_numpy(pictures.places).to(merged.device), pictures.pixels.shape[1:3])
        losses = nn.functional.cross_entropy(
            self.edges(merged).view(-1, FACTOR + 1), wanted.flatten(), reduction="none"
        )
        there = wanted.flatten() < FACTOR
        return 2.0 * losses[there].mean() + losses[~there].mean()

    def _turn_loss(self, merged: torch.Tensor, pictures: Pictures) -> torch.Tensor:
        places = torch.from_numpy(pictures.places).to(merged.device)
        shown = ~places[:, 1, 0].isnan()
        count = (~places[:, 1:, 0].isnan()).sum(1)[:, None] - 1
        wanted = count * MAX_COUNT + nearest(places, pictures.pixels.shape[1:3])
        return 2.0 * nn.functional.cross_entropy(self.turn(merged[shown]).flatten(0, 1), wanted[shown].flatten())


def edges(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return at which pixel of a token each edge is, [n, tokens, 8] from 0 to 31, and 32 where there is none.

    The edges are left, top, right and bottom of the brand, and the same of a product.
    """
    rows, columns = size[0] // FACTOR, size[1] // FACTOR
    down, right = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    starts = torch.stack((right.flatten(), down.flatten()), -1).repeat(1, 2) * float(FACTOR)
    boxes = places[:, None] * torch.tensor([size[1], size[0]] * 2)
    offsets = boxes - starts[:, None]
    inside = (offsets >= 0) & (offsets < FACTOR)
    crossing = (offsets[..., :2] < FACTOR) & (offsets[..., 2:] > 0)
    inside &= crossing.flip(-1).repeat(1, 1, 1, 2)
    found = torch.where(inside, offsets.floor(), float(FACTOR)).long()
    return torch.cat((found[:, :, 0], found[:, :, 1:].amin(2)), -1)


def nearest(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return which product is nearest to each token, [n, tokens] from 0, of places [n, 5, 4] on `size` pixels."""
    rows, columns = size[0] // FACTOR, size[1] // FACTOR
    down, right = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    tokens = torch.stack((right.flatten() / columns, down.flatten() / rows), -1)
    products = places[:, 1:]
    centres = (products[..., :2] + products[..., 2:]) / 2
    far = (centres[:, None] - tokens[None, :, None]).square().sum(-1).nan_to_num(torch.inf)
    return far.argmin(-1)


def targets(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return what each token points to, [n, tokens, 8] as shares of a side, of places [n, 5, 4] on `size` pixels."""
    product = torch.take_along_dim(places[:, 1:], nearest(places, size)[..., None], 1)
    return torch.cat((places[:, :1].expand(product.shape), product), -1)
