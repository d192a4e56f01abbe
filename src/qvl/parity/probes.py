"""The probe of a live side that asks again: does it repeat itself, alone, with its prefix cached, and in a batch."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.parity.causes import Cause, cause
from qvl.parity.diagnose import not_greedy
from qvl.parity.differences import Difference, differ

if TYPE_CHECKING:
    from qvl.parity.case import Case
    from qvl.parity.observation import Observation
    from qvl.parity.sides import LiveSide

Answers: TypeAlias = "Callable[[str], Observation]"
BATCH: Final = 8


async def probe_repeats(
    name: str, side: LiveSide, cases: Sequence[Case], tolerance: float, answered: tuple[Answers, Answers] | None = None
) -> list[Cause]:
    """Return what the side `name` suffers from if it disagrees with itself; asks `cases` alone, again, and at once.

    Each is asked three times alone (twice with the same prefix) and once in a batch of BATCH. `answered` are the
    other side's answers, and its own from before, by case: where its own was another than all of these, prefixes of
    others made the difference; where it answers alone as the other side does, what it depends on is all there is.
    """
    salted = "cache_salt" in side.backend.capabilities.fields

    def named(known: str, how: str, first: Observation, parted: Difference, *, sure: bool = False) -> None:
        answers = not all(parted.layers.get(layer, True) for layer in ("text", "fields", "decisions"))
        explained = answered is not None and not _parts(differ(answered[0](first.case), first, tolerance))
        evidence = f"{name}, {first.case}, {how}: {parted.detail}"
        found.setdefault(known, cause(known, evidence, 1, certain=sure or answers or explained))

    def salt() -> str:
        return secrets.token_hex(8) if salted else ""

    alone: list[Observation] = []
    found: dict[str, Cause] = {}
    for case in cases[:BATCH]:
        mine = salt()
        first = await side.observe(case, salt=mine)
        again = await side.observe(case, salt=salt())
        cached = await side.observe(case, salt=mine)
        alone.append(first)
        if _parts(parted := differ(first, again, tolerance)):
            sampled = any(not_greedy(one) is not None for one in (first, again))
            known = "sampling" if sampled or _same_start(parted) else "batch"
            named(known, "asked alone twice", first, parted, sure=sampled)
        elif salted and _parts(parted := differ(first, cached, tolerance)):
            named("prefix-cache", "its prefix cached", first, parted)
    many = [cases[number % len(cases)] for number in range(BATCH)]
    together = await asyncio.gather(*(side.observe(case, salt=salt()) for case in many))
    if not found:
        for case, one in zip(many, together, strict=True):
            mine_alone = next((other for other in alone if other.case == case.id), None)
            if mine_alone is not None and _parts(parted := differ(mine_alone, one, tolerance)):
                named("batch", f"alone and among {BATCH}", mine_alone, parted)
    if not found and salted and answered is not None:
        for one in alone:
            if _parts(parted := differ(one, answered[1](one.case), tolerance)):
                named("prefix-cache", "alone and behind others whose prefixes were kept", one, parted)
    # A sampled answer may by chance be the same twice, and another where the prefix was kept.
    return [found["sampling"]] if "sampling" in found else list(found.values())


def _parts(one: Difference) -> bool:
    # An answer that failed says nothing of others.
    return one.layer not in (None, "answered") and not one.near_tie


def _same_start(one: Difference) -> bool:
    """Whether the first tokens are as likely in both, so that only the choice among them differs."""
    return one.layers.get("log-probabilities", False)
