"""Questions as System One and LangChain ask them: what yes and no mean, and scales whose levels are described."""

from __future__ import annotations

from collections.abc import Sequence

from qvl.decisions.questions import ChoiceQuestion, Level, Option, Predicate, Score


def yes_or_no(parts: Sequence[object], yes: str, no: str, name: str | None = None) -> Predicate:
    """Return the Predicate of `parts` with what yes and no mean (or "") behind them.

    Raises:
        RequestError: nothing of all that is said.
    """
    lines = [f"{word} means: {text}" for word, text in (("Yes", yes), ("No", no)) if text]
    told = ["\n" * bool(parts) + "\n".join(lines)] if lines else []
    return Predicate([*parts, *told], name)


def one_of(parts: Sequence[object], options: Sequence[Option], name: str | None = None) -> ChoiceQuestion:
    """Return the question which of `options` it is; `parts` may be empty."""
    return ChoiceQuestion(parts or "Which of these is it?", options, name)


def scale(parts: Sequence[object], levels: Sequence[str], name: str | None = None) -> Score:
    """Return the Score whose levels are the numbers from 0, with what they mean; `parts` may be empty.

    A level is answered by its number, so that what it means may be as long as it likes.
    """
    described = [Level(str(number), text) for number, text in enumerate(levels)]
    return Score(parts or "Which of these levels is it?", described, name)
