"""Sampling of a training step's dialogues: the pictures, their order, and the questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.tiny.render import LANGUAGES
from training import places, tasks
from training.tasks import Dialogue, Turn

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from qvl.tiny.render import DrawnProduct
    from training.places import Shown


def analyses(products: Sequence[DrawnProduct | None], count: int, dice: random.Random) -> list[Dialogue]:
    """Return `count` analyses in four languages, a few with a second picture or with follow-up questions."""
    dialogues = []
    for position in dice.sample(range(len(products)), count):
        language = dice.choices(LANGUAGES, weights=(36, 36, 14, 14))[0]
        shown = (position, dice.randrange(len(products))) if dice.random() < 0.05 else (position,)
        dialogue = tasks.analysis(shown, products[position], language)
        if language in tasks.QUESTIONS and dice.random() < 0.15 and len(shown) == 1:
            after = tuple(_ask(products[position], language, dice) for _ in range(2))
            dialogue = Dialogue((*dialogue.turns, *after), system=dialogue.system)
        dialogues.append(dialogue)
    return dialogues


def questions(products: Sequence[DrawnProduct | None], count: int, turns: int, dice: random.Random) -> list[Dialogue]:
    """Return `count` parallel dialogues: `turns` independent questions about one picture."""
    dialogues = []
    for position in dice.sample(range(len(products)), count):
        language = dice.choice(("en", "zh"))
        questioned = [_ask(products[position], language, dice, kind) for kind in dice.sample(tasks.KINDS, turns)]
        first = Turn(questioned[0].question, questioned[0].answer, (position,))
        dialogues.append(Dialogue((first, *questioned[1:]), tasks.system_prompt(language, dice), parallel=True))
    return dialogues


def conversations(products: Sequence[DrawnProduct | None], count: int, dice: random.Random) -> list[Dialogue]:
    """Return `count` dialogues of several turns; some have the text before the picture, or a new picture later."""
    dialogues = []
    for _ in range(count):
        language = dice.choice(("en", "zh"))
        position = dice.randrange(len(products))
        questioned = _ask(products[position], language, dice)
        turns = [Turn(questioned.question, questioned.answer, (position,), text_first=dice.random() < 0.6)]
        for _ in range(dice.randint(1, 3)):
            shown: tuple[int, ...] = ()
            if dice.random() < 0.3:
                position = dice.randrange(len(products))
                shown = (position,)
            questioned = _ask(products[position], language, dice)
            turns.append(Turn(questioned.question, questioned.answer, shown, text_first=dice.random() < 0.4))
        dialogues.append(Dialogue(tuple(turns), tasks.system_prompt(language, dice)))
    return dialogues


def comparisons(
    products: Sequence[DrawnProduct | None],
    count: int,
    turns: int,
    dice: random.Random,
    compared: Sequence[str] = tasks.SAME_KINDS,
) -> list[Dialogue]:
    """Return `count` parallel dialogues about two or three pictures: questions by position and comparisons."""
    return [_comparison(products, turns, dice.choice(compared), dice) for _ in range(count)]


def locations(shown: Sequence[Shown], count: int, dice: random.Random) -> list[Dialogue]:
    """Return `count` dialogues that ask for boxes, sometimes for points, of one or more things on one picture.

    The more products a picture shows, the oftener it is asked about: their boxes are the small ones.
    """
    dialogues = []
    for _ in range(count):
        position = dice.choices(range(len(shown)), weights=[max(1, len(one.products)) for one in shown])[0]
        targets = places.some_targets(shown[position], dice)
        question, answer = places.question(targets, shown[position], points=dice.random() < 0.12)
        dialogues.append(Dialogue((Turn(question, answer, (position,)),)))
    return dialogues


def evidences(shown: Sequence[Shown], count: int, dice: random.Random) -> list[Dialogue]:
    """Return `count` analyses with evidence in four languages."""
    positions = [dice.randrange(len(shown)) for _ in range(count)]
    languages = dice.choices(LANGUAGES, weights=(46, 26, 14, 14), k=count)
    return [
        places.analysis(position, shown[position], language)
        for position, language in zip(positions, languages, strict=True)
    ]


def _comparison(products: Sequence[DrawnProduct | None], turns: int, field: str, dice: random.Random) -> Dialogue:
    language = dice.choice(("en", "zh"))
    first = dice.randrange(len(products))
    partner = _partner(products, first, field, dice) if dice.random() < 0.46 else dice.randrange(len(products))
    shown = [first, partner]
    if dice.random() < 0.25:
        shown.append(dice.randrange(len(products)))
    else:
        dice.shuffle(shown)
    questioned = []
    for _ in range(turns):
        kind, position = dice.choice(tasks.ORDINAL_KINDS), dice.randrange(len(shown))
        questioned.append(tasks.ordinal_turn(kind, position, products[shown[position]], language, dice))
    one, other = products[shown[0]], products[shown[1]]
    if len(shown) == 2 and one is not None and other is not None:
        questioned += [tasks.same_turn(field, one, other, language, dice) for _ in range(turns)]
    dice.shuffle(questioned)
    opening = Turn(questioned[0].question, questioned[0].answer, tuple(shown))
    return Dialogue((opening, *questioned[1:]), tasks.system_prompt(language, dice), parallel=True)


def _partner(products: Sequence[DrawnProduct | None], first: int, field: str, dice: random.Random) -> int:
    value = getattr(products[first], field, None)
    alike = [i for i, other in enumerate(products) if i != first and getattr(other, field, None) == value]
    return dice.choice(alike) if alike else dice.randrange(len(products))


def _ask(product: DrawnProduct | None, language: str, dice: random.Random, kind: str | None = None) -> Turn:
    kind = kind or dice.choice(tasks.KINDS)
    return Turn(tasks.question(kind, language, dice), tasks.answer(kind, product, language))
