"""Requests of every kind, from a seed; asking them, and looking whether anything is left of them."""

from __future__ import annotations

import asyncio
import random
from functools import lru_cache
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw

from qvl.media.gate import load
from qvl.media.picture import Picture
from qvl.types import ChatRequest, ImagePart, Message, Part, Result, SamplingParams, TextPart

if TYPE_CHECKING:
    from qvl.backends.local.backend import LocalBackend
    from qvl.backends.local.engine_request import EngineRequest

SIZES = ((128, 128), (64, 64), (200, 90), (96, 224), (300, 300), (40, 160))
QUESTIONS = (
    "What brand is it?",
    "Which category?",
    "What colour is the second?",
    "Describe the picture.",
    "How many are there?",
    "图里是什么颜色？",
    "Say hello.",
)


@lru_cache(maxsize=64)
def picture(seed: int) -> Picture:
    """A noisy picture with a few shapes; equal seeds give equal pictures."""
    dice = random.Random(seed)
    width, height = SIZES[seed % len(SIZES)]
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = dice.randrange(width), dice.randrange(height)
        colour = tuple(dice.randrange(256) for _ in range(3))
        draw.ellipse((x - 20, y - 20, x + 30, y + 25), fill=colour)  # type: ignore[arg-type]
    return load(image)


def ask(*parts: str | int | Picture, system: str | None = None, **sampling: object) -> ChatRequest:
    """A user turn; a number is the picture of that seed."""
    sampling = {"max_tokens": 8, **sampling}
    messages = [] if system is None else [Message("system", (TextPart(system),))]
    messages.append(Message("user", tuple(_part(part) for part in parts)))
    return ChatRequest(tuple(messages), SamplingParams(**sampling))  # type: ignore[arg-type]


def _part(part: str | int | Picture) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    return ImagePart(picture(part) if isinstance(part, int) else part)


def mixed(count: int, dice: random.Random) -> list[ChatRequest]:
    """One to four pictures or none, system turns, several turns, different lengths."""
    made = []
    for _ in range(count):
        turns = []
        if dice.random() < 0.3:
            turns.append(Message("system", (TextPart(dice.choice(("Be brief.", "You label product pictures."))),)))
        for turn in range(dice.choice((1, 1, 1, 2, 3))):
            if turn:
                turns.append(Message("assistant", (TextPart(dice.choice(("It is red.", "A mug, I think.", "好的"))),)))
            parts: list[Part] = [ImagePart(picture(dice.randrange(24))) for _ in range(dice.choice((0, 1, 1, 2, 4)))]
            parts.insert(dice.randrange(len(parts) + 1), TextPart(dice.choice(QUESTIONS)))
            if dice.random() < 0.3:
                parts.append(TextPart(" ".join(dice.choice(QUESTIONS) for _ in range(dice.randrange(1, 12)))))
            turns.append(Message("user", tuple(parts)))
        made.append(ChatRequest(tuple(turns), SamplingParams(max_tokens=dice.randrange(1, 20))))
    return made


def run(backend: LocalBackend, *requests: ChatRequest) -> list[Result]:
    async def all_of_them() -> list[Result]:
        return await asyncio.gather(*(backend.generate(request) for request in requests))

    return asyncio.run(all_of_them())


def run_together(backend: LocalBackend, *requests: ChatRequest) -> list[Result]:
    """As `run`, but the engine gets all of them at once and in their order, however slowly they are prepared."""
    assert backend._loaded is not None
    mailbox, held = backend._loaded.engine.mailbox, []
    submit = mailbox.submit

    def hold(request: EngineRequest) -> None:
        held.append(request)
        if len(held) == len(requests):
            # A busy machine may leave the engine running between two of them.
            with mailbox._wake:
                for one in sorted(held, key=lambda one: one.request_id):
                    submit(one)

    with patch.object(mailbox, "submit", hold):
        return run(backend, *(one.replace(request_id=f"{place:03}") for place, one in enumerate(requests)))


def same_but_for_ties(one: Result, other: Result, margin: float = 0.5) -> None:
    """Both say the same, and as surely, up to a token whose two likeliest are within `margin` nats in both.

    Both need logprobs=2.
    """
    assert one.logprobs
    assert other.logprobs
    for first, second in zip(one.logprobs, other.logprobs, strict=False):
        for likeliest, next_to_it in zip(first.top, second.top, strict=True):
            if likeliest.token == next_to_it.token:
                assert abs(likeliest.logprob - next_to_it.logprob) < margin
        if first.token != second.token:
            assert all(abs(top[0].logprob - top[1].logprob) < margin for top in (first.top, second.top))
            return
    assert one.text == other.text


def freed(backend: LocalBackend) -> None:
    """Nothing is held: rows, jobs, sequences."""

    async def quiet() -> None:
        for _ in range(200):
            if not backend.stats()["num_running"] + backend.stats()["num_waiting"] + backend.stats()["kv_slots"]:
                return
            await asyncio.sleep(0.02)

    asyncio.run(quiet())
    stats = backend.stats()
    assert {stats[name] for name in ("num_running", "num_waiting", "kv_slots", "kv_used_tokens")} == {0}
    assert backend._loaded is not None
    assert backend._loaded.engine.mailbox.requests() == []
