"""Puts a step's pictures and questions together: which pictures are shown, in which order, and what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.tiny.render import LANGUAGES
from training import tasks
from training.tasks import Dialogue, Turn

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from qvl.tiny.render import DrawnProduct


def analyses(products: Sequence[DrawnProduct | None], count: int, dice: random.Random) -> list[Dialogue]:
    """Analyses in four languages, a few of them with a second picture or with a question after."""
    dialogues = []
    for place in dice.sample(range(len(products)), count):
        language = dice.choices(LANGUAGES, weights=(36, 36, 14, 14))[0]
        shown = (place, dice.randrange(len(products))) if dice.random() < 0.05 else (place,)
        dialogue = tasks.analysis(shown, products[place], language)
        if language in tasks.QUESTIONS and dice.random() < 0.15 and len(shown) == 1:
            after = tuple(_ask(products[place], language, dice) for _ in range(2))
            dialogue = Dialogue((*dialogue.turns, *after), system=dialogue.system)
        dialogues.append(dialogue)
    return dialogues


def questions(products: Sequence[DrawnProduct | None], count: int, turns: int, dice: random.Random) -> list[Dialogue]:
    """Single questions: `turns` of them side by side after one picture, each blind to the others."""
    dialogues = []
    for place in dice.sample(range(len(products)), count):
        language = dice.choice(("en", "zh"))
        asked = [_ask(products[place], language, dice, kind) for kind in dice.sample(tasks.KINDS, turns)]
        first = Turn(asked[0].question, asked[0].answer, (place,))
        dialogues.append(Dialogue((first, *asked[1:]), tasks.system_prompt(language, dice), parallel=True))
    return dialogues


def conversations(products: Sequence[DrawnProduct | None], count: int, dice: random.Random) -> list[Dialogue]:
    """Questions one after another, the text before the picture now and then, sometimes a new picture on the way."""
    dialogues = []
    for _ in range(count):
        language = dice.choice(("en", "zh"))
        place = dice.randrange(len(products))
        asked = _ask(products[place], language, dice)
        turns = [Turn(asked.question, asked.answer, (place,), text_first=dice.random() < 0.6)]
        for _ in range(dice.randint(1, 3)):
            shown: tuple[int, ...] = ()
            if dice.random() < 0.3:
                place = dice.randrange(len(products))
                shown = (place,)
            asked = _ask(products[place], language, dice)
            turns.append(Turn(asked.question, asked.answer, shown, text_first=dice.random() < 0.4))
        dialogues.append(Dialogue(tuple(turns), tasks.system_prompt(language, dice)))
    return dialogues


def comparisons(
    products: Sequence[DrawnProduct | None],
    count: int,
    turns: int,
    dice: random.Random,
    compared: Sequence[str] = tasks.SAME_KINDS,
) -> list[Dialogue]:
    """Two or three pictures in a prompt, asked about by place and, for two products, compared in a field."""
    return [_comparison(products, turns, dice.choice(compared), dice) for _ in range(count)]


def _comparison(products: Sequence[DrawnProduct | None], turns: int, field: str, dice: random.Random) -> Dialogue:
    language = dice.choice(("en", "zh"))
    first = dice.randrange(len(products))
    partner = _partner(products, first, field, dice) if dice.random() < 0.46 else dice.randrange(len(products))
    shown = [first, partner]
    if dice.random() < 0.25:
        shown.append(dice.randrange(len(products)))
    else:
        dice.shuffle(shown)
    asked = []
    for _ in range(turns):
        kind, place = dice.choice(tasks.ORDINAL_KINDS), dice.randrange(len(shown))
        asked.append(tasks.ordinal_turn(kind, place, products[shown[place]], language, dice))
    one, other = products[shown[0]], products[shown[1]]
    if len(shown) == 2 and one is not None and other is not None:
        asked += [tasks.same_turn(field, one, other, language, dice) for _ in range(turns)]
    dice.shuffle(asked)
    opening = Turn(asked[0].question, asked[0].answer, tuple(shown))
    return Dialogue((opening, *asked[1:]), tasks.system_prompt(language, dice), parallel=True)


def _partner(products: Sequence[DrawnProduct | None], first: int, field: str, dice: random.Random) -> int:
    wanted = getattr(products[first], field, None)
    alike = [i for i, other in enumerate(products) if i != first and getattr(other, field, None) == wanted]
    return dice.choice(alike) if alike else dice.randrange(len(products))


def _ask(product: DrawnProduct | None, language: str, dice: random.Random, kind: str | None = None) -> Turn:
    kind = kind or dice.choice(tasks.KINDS)
    return Turn(tasks.question(kind, language, dice), tasks.answer(kind, product, language))
