"""The names of keyword arguments, checked before anything is read or asked."""

from __future__ import annotations

from collections.abc import Iterable

from qvl.errors import ConfigError
from qvl.suggest import nearest


def check_names(verb: str, given: Iterable[str], known: Iterable[str], *beside: str) -> None:
    """Refuse the first name of `given` that is not `known`; `beside` are the other names of the verb ("": several).

    Raises:
        ConfigError: such a name; the nearest that the verb has is named.
    """
    names = frozenset(known)
    for name in given:
        if name not in names:
            what = f"{verb}() has no parameter {name!r}" if verb else f"unknown parameter {name!r}"
            raise ConfigError(what, hint=nearest(name, {*names, *beside}), param=name)


def check_names_of_map(
    given: Iterable[str], known: Iterable[str], *, question: bool, locate: bool, verb: str = "map"
) -> None:
    """Refuse the first name of `given` that `map` does not have, or that means nothing for what is asked.

    `known` are all names; `question` and `locate` tell what is asked of each picture, neither of them an
    analysis.

    Raises:
        ConfigError: such a name.
    """
    check_names(verb, given, known, "question", "schema", "locate", "points")
    of_analyses = {"evidence", "abstain", "calibrated"}
    for name in given:
        if name in of_analyses and (question or locate):
            what = "a question" if question else "locate"
            raise ConfigError(f"{name} is of analyses, not of {what}", hint="leave it out, or use schema=", param=name)
        if name == "system" and not question:
            raise ConfigError("system needs a question", hint="map(pictures, question, system=…)", param=name)
