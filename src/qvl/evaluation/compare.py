"""Comparison of an answer with its label, part by part: exact, as text, as a number, or as a box."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from qvl.calibration.calibration_file import field_name
from qvl.errors import ConfigError

Kind: TypeAlias = Literal["exact", "text", "number", "iou"]
CORNERS: Final = ("x1", "y1", "x2", "y2")
LEAST_IOU: Final = 0.5
_HINT: Final = "FIELD=exact, FIELD=text, FIELD=number:0.01, FIELD=number:1% or FIELD=iou:0.5"


@dataclass(frozen=True, slots=True)
class Rule:
    """The way in which a part is compared.

    Args:
        kind: "exact"; "text": without regard to case, width and spaces; "number"; "iou" of two boxes.
        limit: the largest difference of numbers, the least overlap of boxes.
        relative: the difference is a share of the label.
    """

    kind: Kind
    limit: float = 0.0
    relative: bool = False

    def right(self, label: object, value: object) -> bool:
        """Return whether `value` is right where the label is `label`."""
        if self.kind == "text" and label is not None and value is not None:
            return plain_text(label) == plain_text(value)
        if self.kind == "number" and label is not None:
            wanted, found = _number(label), _number(value)
            if wanted is None or found is None:
                return False
            # As much as a float's last digits may be off.
            slack = 1e-9 * max(1.0, abs(wanted))
            return abs(wanted - found) <= self.limit * (abs(wanted) if self.relative else 1.0) + slack
        if self.kind == "iou" and label is not None:
            return (overlap(label, value) or 0.0) >= self.limit
        return type(label) is type(value) and label == value


@dataclass(frozen=True, slots=True)
class Compared:
    """One part of an answer: where it is, and whether it is right; `answered` is False where the answer has no such."""

    path: str
    right: bool
    answered: bool = True


def read_rules(texts: Sequence[str]) -> dict[str, Rule]:
    """Return the rule of each field from texts such as `price=number:0.01`.

    Raises:
        ConfigError: a text that cannot be read.
    """
    found = {}
    for text in texts:
        name, _, spoken = text.partition("=")
        kind, colon, limit = spoken.partition(":")
        kinds = get_args(Kind)
        if not name or kind not in kinds or (colon and kind not in ("number", "iou")):
            raise ConfigError(f"--compare {text!r} cannot be read", hint=_HINT)
        relative = limit.endswith("%") and kind == "number"
        try:
            value = float(limit.removesuffix("%") if relative else limit) if colon else LEAST_IOU * (kind == "iou")
        except ValueError:
            value = math.nan
        if not 0.0 <= value < math.inf or (kind == "iou" and not 0.0 < value <= 1.0):
            raise ConfigError(f"--compare {text!r}: {limit!r} is not a limit", hint=_HINT)
        found[name] = Rule(kinds[kinds.index(kind)], value / 100 if relative else value, relative)
    return found


def rule_for(label: object) -> Rule:
    """Return the rule for a label that none was named for: by its kind."""
    if isinstance(label, str):
        return Rule("text")
    if isinstance(label, int | float) and not isinstance(label, bool):
        return Rule("number")
    return Rule("iou", LEAST_IOU) if corners(label) else Rule("exact")


def label_parts(label: object, rules: Mapping[str, Rule], path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (path, label) of every part that is compared as a whole; empty lists and mappings are parts too."""
    inner: list[tuple[str, object]] | None = None
    if path and (field_name(path) in rules or (isinstance(label, Mapping | list) and (not label or corners(label)))):
        inner = None
    elif isinstance(label, Mapping):
        inner = [(str(name), value) for name, value in label.items()]
    elif isinstance(label, list):
        inner = [(str(place), value) for place, value in enumerate(label)]
    if inner is None:
        yield path, label
        return
    for name, value in inner:
        yield from label_parts(value, rules, f"{path}.{name}" if path else name)


def compare(label: object, answer: object, rules: Mapping[str, Rule], path: str = "") -> Iterator[Compared]:
    """Yield the comparison of every part of `label` with the same part of `answer`.

    Entries of the answer that the label does not have are not compared, but those of an empty mapping or of a shorter
    list are wrong.
    """
    for where, wanted in label_parts(label, rules, path):
        found, value = value_at(answer, where)
        rule = rules.get(field_name(where))
        if rule is None and isinstance(wanted, Mapping | list) and not wanted:
            extra = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
            yield from (Compared(f"{where}.{name}", right=False) for name in extra)
            if not extra:
                yield Compared(where, right=found and value == wanted, answered=False)
            continue
        rule = rule or rule_for(wanted)
        yield Compared(where, right=found and rule.right(wanted, value), answered=found)
    yield from _beyond(label, answer, rules, path)


def _beyond(label: object, answer: object, rules: Mapping[str, Rule], path: str) -> Iterator[Compared]:
    """Yield, as wrong, the items that lists of the answer have beyond those of the label."""
    if path and (field_name(path) in rules or corners(label)):
        return
    if isinstance(label, list) and isinstance(answer, list):
        if label:
            yield from (Compared(f"{path}.{place}", right=False) for place in range(len(label), len(answer)))
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(label, answer, strict=False))]
    elif isinstance(label, Mapping) and isinstance(answer, Mapping):
        pairs = [(str(name), label[name], answer[name]) for name in label if name in answer]
    else:
        return
    for name, inner, told in pairs:
        yield from _beyond(inner, told, rules, f"{path}.{name}" if path else name)


def value_at(value: object, path: str) -> tuple[bool, object]:
    """Return (whether there is anything at `path`, what it is)."""
    parts = path.split(".") if path else []
    while parts:
        if isinstance(value, list) and parts[0].isdigit() and int(parts[0]) < len(value):
            value, parts = value[int(parts[0])], parts[1:]
            continue
        if not isinstance(value, Mapping):
            return False, None
        # A key may have dots itself, and then stand beside the shorter one.
        count = next((count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in value), 0)
        if not count:
            return False, None
        value, parts = value[".".join(parts[:count])], parts[count:]
    return True, value


def plain_text(value: object) -> str:
    """Return a value's text without regard to case, width of letters and spaces."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _number(value: object) -> float | None:
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def corners(value: object) -> tuple[float, float, float, float] | None:
    """Return (x1, y1, x2, y2) of a box as JSON: an object with these names; None for anything else."""
    if not isinstance(value, Mapping) or not value.keys() >= set(CORNERS):
        return None
    numbers = [_number(value[name]) for name in CORNERS]
    x1, y1, x2, y2 = numbers
    if x1 is None or y1 is None or x2 is None or y2 is None:
        return None
    return x1, y1, x2, y2


def right_boxes(labels: Sequence[object], boxes: Sequence[object], rule: Rule) -> list[bool]:
    """Return for each box, the surest first, whether it is right; a labelled box counts for the first that has it."""
    left = list(labels)
    found = []
    for box in boxes:
        best = max(left, key=lambda label: overlap(label, box) or 0.0, default=None)
        right = best is not None and rule.right(best, box)
        if right:
            left.remove(best)
        found.append(right)
    return found


def overlap(one: object, other: object) -> float | None:
    """Return the area that two boxes share over the area of either, 0 to 1; None unless both are boxes."""
    boxes = [corners(dict(zip(CORNERS, box, strict=False)) if isinstance(box, list) else box) for box in (one, other)]
    if boxes[0] is None or boxes[1] is None:
        return None
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes[0], boxes[1]
    shared = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    whole = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared
    return shared / whole if whole > 0 else 0.0
