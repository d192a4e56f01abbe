"""What `locate()` is asked for, the schema of its answer, and the reading of that answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qvl.analysis.confidence import confidences
from qvl.analysis.find_json import find_values
from qvl.errors import AnalysisError, ConfigError
from qvl.evidence.coordinates import Frame
from qvl.evidence.read_shapes import PLACE_NAMES, Form, RawShape, raw_shapes, shapes_in_text
from qvl.evidence.shapes import Box, Located, Point
from qvl.types import JsonObject

if TYPE_CHECKING:
    from qvl.types import TokenLogprob

MOST_TARGETS: Final = 100
LONGEST_TARGET: Final = 200


def read_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """Return what is to be located, each text trimmed, its white space single.

    Raises:
        ConfigError: none, too many, one that is empty, not text, too long, named twice, or has a semicolon.
    """
    hint = 'name what to locate, such as "the brand" or ["the cap", "the label"]'
    if isinstance(targets, str):
        targets = [targets]
    if isinstance(targets, bytes) or not isinstance(targets, Iterable):
        raise ConfigError(f"the targets are a {type(targets).__name__}", hint=hint, param="targets")
    found: list[str] = []
    for number, target in enumerate(targets):
        param = f"targets[{number}]"
        if not isinstance(target, str):
            raise ConfigError(f"{param} is a {type(target).__name__}, not text", hint=hint, param=param)
        words = " ".join(target.split())
        if not words:
            raise ConfigError(f"{param} is empty", hint=hint, param=param)
        if not words.isprintable():
            raise ConfigError(f"{param} has a control character", hint="plain words", param=param)
        if len(words) > LONGEST_TARGET:
            what = f"{param} has {len(words)} characters"
            raise ConfigError(what, hint=f"at most {LONGEST_TARGET}", param=param)
        if ";" in words:
            # The prompt puts one between two targets.
            raise ConfigError(f"{param} has a semicolon", hint="list several targets one by one", param=param)
        if words.casefold() in map(str.casefold, found):
            raise ConfigError(f"{param} {words!r} is named twice", hint="name each target once", param=param)
        found.append(words)
        if len(found) > MOST_TARGETS:
            raise ConfigError("too many targets", hint=f"at most {MOST_TARGETS} to a request", param="targets")
    if not found:
        raise ConfigError("no target is named", hint=hint, param="targets")
    return tuple(found)


def locate_schema(targets: Sequence[str], frame: Frame, *, points: bool, list_on_top: bool) -> JsonObject:
    """Return the schema of the answer to `locate_prompt`; without `list_on_top`, of an object whose `answer` it is."""
    name = "point_2d" if points else "bbox_2d"
    item: JsonObject = {
        "type": "object",
        "properties": {name: coordinates_schema(frame, "point" if points else "box"), "label": {"enum": list(targets)}},
        "required": [name, "label"],
        "additionalProperties": False,
    }
    several: JsonObject = {"type": "array", "items": item}
    if list_on_top:
        return several
    return {"type": "object", "properties": {"answer": several}, "required": ["answer"], "additionalProperties": False}


def coordinates_schema(frame: Frame, form: Form) -> JsonObject:
    """Return the schema of the coordinates of a box or point, in the model's own numbers."""
    most = int(max(frame.right, frame.bottom))
    size = 4 if form == "box" else 2
    number = {"type": "integer", "minimum": 0, "maximum": most}
    return {"type": "array", "items": number, "minItems": size, "maxItems": size}


def read_located(
    text: str,
    logprobs: Sequence[TokenLogprob] | None,
    targets: Sequence[str],
    frame: Frame,
    *,
    points: bool,
    complete: bool,
) -> tuple[list[Located], list[str]]:
    """Return (what was located, in the order of the targets; notes on what was left out or changed).

    Raises:
        AnalysisError: the answer has no list of boxes or points; `raw` keeps it.
    """
    form: Form = "point" if points else "box"
    read: list[tuple[RawShape, float | None]] = []
    matches = find_values(text)
    starts = [match.start for match in matches if match.exact]
    sides = {
        at: (text[left:at], text[at:right])
        for left, at, right in zip([0, *starts], starts, [*starts[1:], None], strict=False)
    }
    for match in matches:
        shapes = raw_shapes(match.value, form)
        if match.exact:
            before, behind = sides[match.start]
            shapes = [shape if shape.label else replace(shape, before=before, behind=behind) for shape in shapes]
        sure: dict[str, float] = {}
        if match.exact and shapes:
            _, sure = confidences(text, logprobs, match.start, wholes={shape.path for shape in shapes if shape.path})
        whole = confidences(text, logprobs, match.start)[0] if match.exact and not all(s.path for s in shapes) else None
        read += [(shape, sure.get(shape.path) if shape.path else whole) for shape in shapes]
    if not read:
        read = [(shape, None) for shape in shapes_in_text(text, form)]
    if not read and not any(isinstance(match.value, list | dict) and not _says(match.value) for match in matches):
        if not complete:
            raise AnalysisError("the answer was cut off", raw=text, hint="raise max_tokens")
        what = "points" if points else "boxes"
        raise AnalysisError(f"the answer has no list of {what}: {brief(text)}", raw=text)
    found, notes = _placed(read, targets, frame, points)
    if not complete:
        notes.append(f"the answer was cut off by max_tokens after {len(found)} of its {form}s")
    order = {target: number for number, target in enumerate(targets)}
    return sorted(found, key=lambda item: order[item.label]), notes


def _placed(
    read: Sequence[tuple[RawShape, float | None]], targets: Sequence[str], frame: Frame, points: bool
) -> tuple[list[Located], list[str]]:
    found: list[Located] = []
    notes: list[str] = []
    known: set[object] = set()
    nameless = [raw for raw, _ in read if not raw.label]
    # Where names stand behind the places ("[1, 2, 3, 4]: cap"), one stands behind the last and none before the first.
    behind = bool(nameless and _named(nameless[-1].behind, targets) and not _named(nameless[0].before, targets))
    for raw, sure in read:
        label = _target(raw.label, targets)
        label = label or _named(raw.behind if behind else raw.before, targets, first=behind)
        if label is None and not raw.label:
            notes.append(f"left out {brief(raw.written)}: it has no label, and several targets were asked for")
            continue
        if label is None:
            notes.append(f"left out a {raw.form} labelled {str(raw.label)[:40]!r}: that was not asked for")
            continue
        shape, told = placed(raw, frame)
        box, point = (shape if isinstance(shape, Box) else None), (shape if isinstance(shape, Point) else None)
        if shape is not None and (label, shape) in known:
            notes.append(f"left out repetitions of {brief(raw.written)} for {label!r}")
            continue
        known.add((label, shape))
        if shape is None:
            notes.append(f"left out {brief(raw.written)} for {label!r}: {told}")
        elif box is not None and points:
            notes.append(f"{label!r} was answered with a box; its middle is the point")
            found.append(Located(label, point=box.center, confidence=sure))
        elif box is None and not points:
            notes.append(f"left out {brief(raw.written)} for {label!r}: a point, not a box")
        else:
            if told:
                notes.append(f"{told}: {brief(raw.written)} for {label!r}")
            found.append(Located(label, box, point, sure))
    return found, notes


def placed(raw: RawShape, frame: Frame) -> tuple[Box | Point | None, str]:
    """Return (the box or point that was written, what was done to it), or (None, why it cannot be used)."""
    values, told = raw.values or (), ""
    if frame.relative and values and max(values) <= 1 and not all(map(float.is_integer, values)):
        # As thousandths they would be less than a pixel of any picture.
        values, told = tuple(1000 * value for value in values), "read as fractions of the picture"
    shape = frame.box(values) if raw.form == "box" else frame.point(values)
    if shape is None:
        return None, _fault(raw)
    return shape, "cut at the picture's edges" if shape.clipped else told


def _fault(raw: RawShape) -> str:
    size = 4 if raw.form == "box" else 2
    if raw.values is None or len(raw.values) != size:
        return f"a {raw.form} needs {size} numbers"
    if any(value != value for value in raw.values):
        return "not a number"
    if size == 4 and (raw.values[0] == raw.values[2] or raw.values[1] == raw.values[3]):
        return "it has no area"
    return "it is outside of the picture"


def _target(label: str | None, targets: Sequence[str]) -> str | None:
    """Return the target that a label stands for; None if none does, or several may."""
    if len(targets) == 1:
        return targets[0]
    words = " ".join((label or "").split()).casefold().strip("'\"")
    if not words:
        return None
    known = {target.casefold(): target for target in targets}
    if words in known:
        return known[words]
    near = [target for name, target in known.items() if words in name or name in words]
    return near[0] if len(near) == 1 else None


def _named(text: str, targets: Sequence[str], *, first: bool = False) -> str | None:
    """Return the target that stands last in a text, or first; of two at one place the longer; None if none does."""
    words = " ".join(text.split()).casefold()
    found = []
    for target in targets:
        # Within a word of the Latin alphabet nothing begins.
        spans = [match.span() for match in re.finditer(rf"(?<![a-z]){re.escape(target.casefold())}", words)]
        found += [(-spans[0][0] if first else spans[-1][1], len(target), target)] if spans else []
    return max(found)[2] if found else None


def _says(value: object) -> bool:
    """True if a JSON value says something that is not a box; empty lists, and places that are null, say "none"."""
    if isinstance(value, list):
        return any(map(_says, value))
    if isinstance(value, dict):
        if any(name in value and value[name] is None for name in PLACE_NAMES):
            return False
        return any(map(_says, value.values()))
    return value is not None


def brief(written: object) -> str:
    """Return what a model wrote, short enough for a note."""
    text = " ".join(str(written).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
