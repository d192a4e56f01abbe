"""First stage of training: the vision tower alone learns brand, category, colour and count through linear heads.

With only the language loss, accuracy stays at chance for thousands of steps; with the heads it rises at once.
The heads are also an auxiliary loss of the second stage, and are dropped afterwards.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from training.network import grid, patches
from training.pictures import BUCKETS, FIELDS, UNKNOWN, Pictures, PictureStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from training.workers import Team


class Heads(nn.Module):
    """One linear classifier per field over the mean of a picture's merged tokens."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({field: nn.Linear(width, classes) for field, classes in FIELDS.items()})

    def forward(self, merged: torch.Tensor, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss and the correct counts [4] for merged tokens [n, tokens, width] of `pictures`."""
        pooled, classes = merged.mean(1), torch.from_numpy(pictures.classes).long().to(merged.device)
        loss = merged.new_zeros(())
        correct = []
        for column, head in enumerate(self.heads.values()):
            logits = head(pooled)
            loss = loss + nn.functional.cross_entropy(logits, classes[:, column], ignore_index=UNKNOWN)
            correct.append((logits.argmax(-1) == classes[:, column]).float().sum())
        return loss, torch.stack(correct)


def learning_rate(step: int, steps: int, peak: float, *, warmup: int = 100, floor: float = 0.02) -> float:
    """Return the learning rate: linear over `warmup` steps, then a half cosine down to `floor` times the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def draw_batch(
    store: PictureStore, size: int, dice: np.random.Generator, *, other_share: float = 0.5
) -> list[Pictures]:
    """Return square pictures, and some of two other grids."""
    others = round(size * other_share)
    one, other = (1 + int(number) for number in dice.permutation(len(BUCKETS) - 1)[:2])
    half = others // 2
    parts = [store.take(0, size - others, dice), store.take(one, half, dice), store.take(other, others - half, dice)]
    return [part for part in parts if len(part)]


def see(visual: Any, pixels: NDArray[np.uint8]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return merged tokens [n, tokens, width] of pictures of one grid, and the same of every deepstack layer."""
    outputs = visual(patches(pixels), grid_thw=grid(pixels))
    count = len(pixels)
    return outputs.pooler_output.view(count, -1, outputs.pooler_output.shape[-1]), [
        layer.view(count, -1, layer.shape[-1]) for layer in outputs.deepstack_features
    ]


def train_vision(
    visual: Any,
    heads: nn.Module,
    store: PictureStore,
    team: Team,
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    report: Callable[[str], None],
    save: Callable[[int], None],
    first_step: int = 0,
    oblong: float = 0.5,
) -> None:
    """Train `visual` and `heads` in place. `batch` is the number of pictures per worker and step."""
    dice = np.random.default_rng((seed, team.rank, first_step) if first_step else (seed, team.rank))
    layers_of_second_stage, visual.deepstack_visual_indexes = visual.deepstack_visual_indexes, []
    idle = set(visual.deepstack_merger_list.parameters())
    parameters = [p for p in visual.parameters() if p not in idle] + list(heads.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    hits: torch.Tensor | float = 0.0
    samples, started = 0, time.monotonic()
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = min(learning_rate(step, steps, peak, floor=0.2), peak * (step - first_step + 1) / 100)
        total = torch.zeros(())
        for pictures in draw_batch(store, batch, dice, other_share=oblong):
            loss, correct = heads(see(visual, pictures.pixels)[0], pictures)
            total = total + loss * (len(pictures) / batch)
            hits, samples = hits + correct, samples + len(pictures)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        team.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            assert isinstance(hits, torch.Tensor)
            shares = " ".join(f"{hit / samples:.3f}" for hit in hits.tolist())
            report(f"vision {step + 1} loss {total.item():.3f} heads {shares} {time.monotonic() - started:.0f}s")
            hits, samples = 0.0, 0
            if (step + 1) % 200 == 0:
                save(step + 1)
    visual.deepstack_visual_indexes = layers_of_second_stage
