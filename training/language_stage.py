"""Second stage of training: the whole network learns to answer; the first stage's heads stay as an auxiliary loss.

The pictures of a step are encoded once and used in many rows: analyses, questions, conversations, comparisons.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from training import lessons, tasks
from training.network import token_id
from training.pictures import FACTOR, PictureStore
from training.rows import IGNORED, Batch, RowWriter, collate
from training.vision_stage import draw_batch, learning_rate, see

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.places import Shown
    from training.tasks import Dialogue
    from training.workers import Team

VERDICT_WEIGHT: Final = 4.0


@dataclass(frozen=True, slots=True)
class Menu:
    """The mixture of a worker's step: numbers of pictures and of rows of each kind, and the fields to compare."""

    pictures: int = 36
    analyses: int = 10
    questions: int = 11
    conversations: int = 5
    comparisons: int = 8
    without_picture: int = 1
    locations: int = 0
    evidences: int = 0
    compared: tuple[str, ...] = tasks.SAME_KINDS

    def times(self, factor: float) -> Menu:
        """Return the mixture with all numbers multiplied by `factor`."""
        rows = ("pictures", "analyses", "questions", "conversations", "comparisons", "without_picture")
        taught = {name: round(factor * getattr(self, name)) for name in ("locations", "evidences")}
        return replace(self, **{name: max(1, round(factor * getattr(self, name))) for name in rows}, **taught)

    def serve(self, shown: list[Shown], dice: random.Random) -> list[list[Dialogue]]:
        """Return batches of dialogues, each of dialogues of similar length."""
        products = [picture.product for picture in shown]
        long = lessons.analyses(products, self.analyses, dice)
        long += [tasks.without_picture(dice.choice(("en", "zh")), dice) for _ in range(self.without_picture)]
        short = lessons.questions(products, self.questions, 4, dice)
        short += lessons.conversations(products, self.conversations, dice)
        short += lessons.comparisons(products, self.comparisons, 2, dice, self.compared)
        located = lessons.locations(shown, self.locations, dice) + lessons.evidences(shown, self.evidences, dice)
        located.sort(key=lambda dialogue: len(dialogue.turns[0].answer))
        cuts = [0, *(len(located) * part // 20 for part in (6, 12, 17)), len(located)]
        batches = [long, short, *(located[start:end] for start, end in pairwise(cuts))]
        return [batch for batch in batches if batch]


@dataclass(frozen=True, slots=True)
class Views:
    """The vision tower's outputs for a step's pictures, in pool order: merged tokens and deepstack layers, each
    [tokens, width]."""

    grids: list[tuple[int, int]]
    merged: list[torch.Tensor]
    layers: list[list[torch.Tensor]]
    shown: list[Shown]
    heads_loss: torch.Tensor
    hits: torch.Tensor


def look(
    visual: Any, heads: nn.Module, store: PictureStore, count: int, dice: np.random.Generator, oblong: float = 0.25
) -> Views:
    """Take `count` pictures from the store, a share `oblong` of them not square, and return their tower outputs."""
    views = Views([], [], [], [], torch.zeros(()), torch.zeros(()))
    for pictures in draw_batch(store, count, dice, other_share=oblong):
        merged, layers = see(visual, pictures.pixels)
        loss, hits = heads(merged, pictures)
        height, width = pictures.pixels.shape[1:3]
        views = replace(
            views, heads_loss=views.heads_loss + loss * (len(pictures) / count), hits=views.hits + hits.detach()
        )
        views.grids.extend([(height // FACTOR, width // FACTOR)] * len(pictures))
        views.merged.extend(merged.unbind(0))
        views.layers.extend(list(picture) for picture in zip(*(layer.unbind(0) for layer in layers), strict=True))
        views.shown.extend(pictures.shown())
    return views


def answer_loss(
    model: Any, views: Views, batch: Batch, verdicts: torch.Tensor, digits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy of answer tokens, and counts [tokens, correct, verdicts, correct verdicts].

    `verdicts` are the ids that open "yes" and "no": one token decides a comparison, so it weighs as much as several.
    `digits` are ids that weigh twice: the form around a box's numbers is learnt at once.
    """
    embeds = model.model.language_model.embed_tokens(batch.ids)
    shown = batch.ids == token_id("<|image_pad|>")
    embeds = embeds.masked_scatter(shown[..., None], torch.cat([views.merged[i] for i in batch.pictures]))
    deep = [torch.cat([views.layers[i][level] for i in batch.pictures]) for level in range(len(views.layers[0]))]
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        visual_pos_masks=shown,
        deepstack_visual_embeds=deep,
        use_cache=False,
    ).last_hidden_state
    learnt = batch.targets != IGNORED
    logits, labels = model.lm_head(hidden[learnt]), batch.targets[learnt]
    foretold, verdict = logits.argmax(-1) == labels, torch.isin(labels, verdicts)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    counts = torch.stack((learnt.sum(), foretold.sum(), verdict.sum(), (foretold & verdict).sum()))
    weights = 1.0 + (VERDICT_WEIGHT - 1.0) * verdict + torch.isin(labels, digits)
    return (losses * weights).sum(), counts.float()


def train_language(
    model: Any,
    heads: nn.Module,
    store: PictureStore,
    writer: RowWriter,
    team: Team,
    *,
    steps: int,
    first_step: int,
    menu: Menu,
    peak: float,
    vision_share: float,
    heads_weight: float,
    seed: int,
    report: Callable[[str], None],
    save: Callable[[int], None],
    deadline: float | None = None,
    oblong: float = 0.25,
) -> int:
    """Train `model` and `heads` in place and return the number of steps.

    `vision_share` scales the learning rate of tower and heads; zero freezes both. With `deadline` (`time.monotonic()`)
    the cosine schedule follows the clock instead of `steps`.
    """
    dice = np.random.default_rng((seed, team.rank, first_step))
    talk = random.Random(f"{seed}-{team.rank}-{first_step}")
    seeing = [*model.model.visual.parameters(), *heads.parameters()]
    for parameter in seeing:
        parameter.requires_grad_(vision_share > 0)
    speaking = list(model.model.language_model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": seeing, "share": vision_share}, {"params": speaking, "share": 1.0}],
        lr=peak,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        fused=True,
    )
    verdicts = torch.tensor([writer.first_id(word) for pair in tasks.YES_NO.values() for word in pair])
    digits = torch.tensor(
        [writer.first_id(digit) for digit in "0123456789"] if menu.locations else [], dtype=torch.long
    )
    tokens, hits, loss_sum, started = torch.zeros(4), torch.zeros(()), 0.0, time.monotonic()
    step = first_step
    while step < steps:
        pace = step / steps
        if deadline is not None:
            pace = team.agree(max(pace, (time.monotonic() - started) / max(1.0, deadline - started)))
            if pace >= 1.0:
                break
        rate = min(learning_rate(int(pace * 10_000), 10_000, peak, warmup=1), peak * (step - first_step + 1) / 60)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        views = look(model.model.visual, heads, store, menu.pictures, dice, oblong)
        loss, counted = torch.zeros(()), torch.zeros(4)
        for dialogues in menu.serve(views.shown, talk):
            batch = collate([writer.write(dialogue, views.grids) for dialogue in dialogues])
            part, numbers = answer_loss(model, views, batch, verdicts, digits)
            loss, counted = loss + part, counted + numbers
        loss = loss / counted[0]
        optimizer.zero_grad()
        (loss + heads_weight * views.heads_loss).backward()  # type: ignore[no-untyped-call]
        team.average_gradients([*seeing, *speaking])
        nn.utils.clip_grad_norm_([*seeing, *speaking], 1.0)
        optimizer.step()
        step += 1
        tokens, hits, loss_sum = tokens + counted, hits + views.hits, loss_sum + loss.item()
        if step % 25 == 0:
            shares = " ".join(f"{hit / (25 * menu.pictures):.3f}" for hit in hits.tolist())
            right, verdict = (tokens[i + 1].item() / max(1.0, tokens[i].item()) for i in (0, 2))
            clock = time.monotonic() - started
            report(
                f"answers {step} loss {loss_sum / 25:.4f} tokens {right:.4f} yes/no {verdict:.3f} "
                f"heads {shares} {clock:.0f}s"
            )
            tokens, hits, loss_sum = torch.zeros(4), torch.zeros(()), 0.0
        if step % 100 == 0:
            save(step)
    save(step)
    return step
