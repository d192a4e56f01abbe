"""Which side is probed, and what the probes make of the causes that a diagnosis named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qvl.parity.causes import Cause, cause
from qvl.parity.differences import INPUT_LAYERS, LAYERS
from qvl.parity.probes import Answers, probe_repeats
from qvl.parity.side_probes import probe_pictures

if TYPE_CHECKING:
    from qvl.parity.case import Case
    from qvl.parity.diagnose import Diagnosis
    from qvl.parity.sides import LiveSide
    from qvl.parity.tally import ParityTally

PROBED: Final = 4


@dataclass(slots=True)
class Probing:
    """The probes of the sides of a comparison.

    Args:
        cases, tally, diagnosis: what was compared, and what it amounts to.
        tolerance: log-probabilities within it, in nats, are the same.
    """

    cases: Sequence[Case]
    tally: ParityTally
    diagnosis: Diagnosis
    tolerance: float
    _repeats: dict[str, list[Cause]] = field(default_factory=dict)
    _pictures: list[Cause] = field(default_factory=list)

    async def ask(self, name: str, side: LiveSide, answered: tuple[Answers, Answers]) -> None:
        """Probe the side `name`, "A" or "B"; `answered` are the other side's answers, and its own, by case."""
        parting = self._parting()
        self._repeats[name] = await probe_repeats(name, side, parting, self.tolerance, answered) if parting else []
        if any(case.pictures for case in self.cases):
            found = await probe_pictures(name, side, self.tolerance)
            self._pictures += [one.cause for one in found if one.cause is not None]

    def _parting(self) -> list[Case]:
        """Return cases that part behind their input."""
        inputs = (None, "answered", *INPUT_LAYERS)
        return [case for case in self.cases if self.tally.parting.get(case.id) not in inputs][:PROBED]

    def wanted(self, side: LiveSide) -> bool:
        """Return whether A, once B was probed, is worth it too: it reads pictures itself, or other answers need it."""
        if any(case.pictures for case in self.cases) and not side.backend.wants_pixels:
            return True
        known = any(one.certain and one not in self._pictures for one in self.causes())
        return bool(self._parting()) and (self.diagnosis.samples("A") or not known)

    def causes(self) -> list[Cause]:
        """Return the causes of the diagnosis with those of the probes; what these explain better is left out."""
        causes = self.diagnosis.causes()
        found = [one for own in self._repeats.values() for one in own]
        if any(one.certain and one.layer == "log-probabilities" for one in causes):
            # What is known to be other numbers depends on the batch more, too, without that being what parts the sides.
            found = [one for one in found if one.certain]
        if found:
            # It is known better than that.
            causes = [one for one in causes if one.name != "kernels"]
        names = {one.name for one in found if one.certain}
        for side, own in self._repeats.items():
            if self.diagnosis.samples(side):
                # If it writes tokens that are not the likeliest, but the same ones each time, it is a penalty.
                again = any(one.name == "sampling" for one in own)
                kept = (one for one in causes if one.name != "sampling" or not again)
                causes = [_penalty(one) if one.name == "sampling" else one for one in kept]
        if any(one.name == "penalty" for one in causes):
            # Other tokens are other numbers too.
            causes = [one for one in causes if one.name != "kernels"]
        if names:
            # A side that disagrees with itself has other numbers whatever its weights.
            causes = [one for one in causes if one.certain and one.name not in names]
        known = {one.name for one in causes}
        whole = [*causes, *found, *(one for one in self._pictures if one.name not in known)]
        return sorted(whole, key=lambda one: (not one.certain, LAYERS.index(one.layer), -one.cases))


def _penalty(sampling: Cause) -> Cause:
    return cause("penalty", sampling.evidence, sampling.cases)
