"""Two models on the same labels: which is right where the other is wrong, and whether the loss is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qvl.calibration.calibration_file import field_name
from qvl.evaluation.agreement import Paired, cases_to_tell, mcnemar
from qvl.evaluation.collect import ANSWER

if TYPE_CHECKING:
    from qvl.evaluation.evaluate import EvalReport
    from qvl.types import JsonObject


@dataclass(frozen=True, slots=True)
class Against:
    """A model against another, by field: A is the other, B the model; `difference` is what the model gains.

    `standing` is of the whole answer: "within" if its accuracy has sunk by no more than `allow`, "beyond" if by more,
    "undecided" if so many lines cannot tell; "told" where nothing was allowed. `lines_needed` would tell a change of
    `allow`, or of 1 %, with a power of 80 %.
    """

    other: EvalReport
    fields: Mapping[str, Paired]
    allow: float | None
    standing: Literal["within", "beyond", "undecided", "told"]
    lines_needed: int

    def to_json(self) -> JsonObject:
        """Return the comparison as JSON values."""
        return {
            "model": self.other.model,
            "report": self.other.to_json(),
            "fields": {name: dataclasses.asdict(paired) for name, paired in self.fields.items()},
            "allow": self.allow,
            "standing": self.standing,
            "lines_needed": self.lines_needed,
        }


def against(model: EvalReport, other: EvalReport, allow: float | None) -> Against:
    """Return the comparison of `model` with `other`, both asked about the same lines."""
    names: dict[str, list[tuple[str, str]]] = {}
    questions = {score.name for score in model.fields}
    for line, path in model.right:
        if (line, path) in other.right:
            name = path if path in questions else field_name(path)
            names.setdefault(name, []).append((line, path))
    fields = {
        name: mcnemar([other.right[key] for key in keys], [model.right[key] for key in keys])
        for name, keys in sorted(names.items(), key=lambda item: item[0] != ANSWER)
    }
    whole = fields[ANSWER]
    standing: Literal["within", "beyond", "undecided", "told"] = "told"
    if allow is not None:
        low, high = whole.interval
        standing = "within" if low >= -allow else "beyond" if high < -allow else "undecided"
    parting = (whole.only_a + whole.only_b) / whole.count
    return Against(other, fields, allow, standing, cases_to_tell(allow or 0.01, parting))
