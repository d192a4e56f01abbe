"""Reads boxes and points from what a model wrote: lists, objects, strings, markers, with or without labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Form: TypeAlias = Literal["box", "point"]

_BOX_NAMES: Final = ("bbox_2d", "bbox", "box", "bounding_box", "bbox2d")
_POINT_NAMES: Final = ("point_2d", "point", "point2d")
PLACE_NAMES: Final[dict[str, Form]] = {
    **dict.fromkeys(_BOX_NAMES, "box"),
    **dict.fromkeys(_POINT_NAMES, "point"),
    # Where several are in one.
    **dict.fromkeys(("boxes", "bboxes"), "box"),
    "points": "point",
}
_LABELS: Final = ("label", "name", "text_content", "class", "category", "object", "target")
_CORNERS: Final = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))
# Names around a list of objects, which are no labels.
_WRAPPERS: Final = frozenset(
    ("answer", "answers", "objects", "results", "result", "items", "detections", "instances", "locations", "data")
)
_NUMBER: Final = r"-?\d+(?:\.\d+)?"
_PAIR: Final = rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
# As Qwen2-VL writes them, with or without its markers around.
_PAIRS: Final = re.compile(rf"{_PAIR}(?:\s*,\s*{_PAIR})?")
_TAG: Final = re.compile(r"</?[a-z_]+>|<\|[a-z_]+\|>")
_DEEPEST: Final = 8


@dataclass(frozen=True, slots=True)
class RawShape:
    """Coordinates as the model wrote them, with their label and the path (see `value_spans`) of their object.

    `before` and `behind` are the texts around one without a label, up to the next places, which may name it. `values`
    are not checked: their number, range and finiteness are what the model made of them; None where one of them is no
    number. `picture` is the number that the model gave, from 1.
    """

    form: Form
    values: tuple[float, ...] | None
    label: str | None = None
    path: str = ""
    picture: int | None = None
    written: object = None
    before: str = ""
    behind: str = ""


def raw_shapes(value: object, form: Form, path: str = "", label: str | None = None) -> list[RawShape]:
    """Return the boxes and points in a JSON value, in order; `form` is what bare coordinates are taken for."""
    return list(_walk(value, form, path, label, _DEEPEST))


def shapes_in_text(text: str, form: Form) -> list[RawShape]:
    """Return the boxes and points of a text without JSON: `(112,340),(520,410)`.

    A text of numbers alone, with tags around them or none, is one; `form` is what its numbers are taken for.
    """
    shapes = []
    matches = list(_PAIRS.finditer(text))
    ends, starts = [0, *(match.end() for match in matches)], [*(match.start() for match in matches), len(text)]
    around = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    for match, before, behind in zip(matches, around, around[1:], strict=False):
        values = tuple(float(number) for number in match.groups() if number is not None)
        kind: Form = "box" if len(values) == 4 else "point"
        shapes.append(RawShape(kind, values, written=match.group(), before=before, behind=behind))
    bare = raw_shapes(_TAG.sub(" ", text).strip().strip('"'), form)
    return shapes or [shape for shape in bare if len(shape.values or ()) in (2, 4)]


def _walk(value: object, form: Form, path: str, label: str | None, depth: int) -> Iterator[RawShape]:
    if depth < 0:
        return
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, Mapping):
        yield from _of_object(value, form, path, label, depth)
    elif isinstance(value, list):
        corners = _corner_by_corner(value) if form == "box" else None
        if corners is not None or _is_place(value):
            numbers = value if corners is None else corners
            yield RawShape(_form_of(numbers, form), coordinates(numbers), label, path, written=value)
            return
        for number, item in enumerate(value):
            if isinstance(item, str | Mapping | list):
                yield from _walk(item, form, below(path, number), label, depth - 1)


def _of_object(value: Mapping[str, object], form: Form, path: str, label: str | None, depth: int) -> Iterator[RawShape]:
    own = next((str(value[name]) for name in _LABELS if isinstance(value.get(name), str | int)), label)
    number = _number(value.get("picture", value.get("image")))
    picture = int(number) if number is not None and number.is_integer() else None
    named = [(name, of) for name, of in PLACE_NAMES.items() if value.get(name) is not None]
    for name, of in named:
        place = value[name]
        inner = _listed(place) if isinstance(place, str) else place
        if isinstance(inner, list) and inner and all(isinstance(item, list | Mapping) for item in inner):
            # Corner by corner, or several of one label.
            if of == "box" and (corners := _corner_by_corner(inner)) is not None:
                yield RawShape(of, coordinates(corners), own, path, picture, place)
                continue
            for item in inner:
                yield RawShape(of, coordinates(item), own, path, picture, item)
        else:
            yield RawShape(of, coordinates(inner), own, path, picture, place)
    if named:
        return
    if (of_corners := _form_of_corners(value)) is not None:
        yield RawShape(of_corners, coordinates(value), own, path, picture, value)
        return
    for name, inner in value.items():
        # A target may be called "label" or "name" itself: then its place stands there.
        if isinstance(inner, list | Mapping) or (isinstance(inner, str) and name not in _LABELS):
            known = own if own is not None or name.lower() in _WRAPPERS else name
            yield from _walk(inner, form, below(path, name), known, depth - 1)


def coordinates(value: object) -> tuple[float, ...] | None:
    """Return the numbers of a box or point in any of its forms; None if it has something else in it."""
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, Mapping):
        names = next((names for names in (*_CORNERS, ("x", "y")) if all(name in value for name in names)), None)
        if names is None:
            return None
        value = [value[name] for name in names]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    numbers = [_number(item) for item in value]
    return tuple([number for number in numbers if number is not None]) if None not in numbers else None


def _form_of_corners(value: Mapping[str, object]) -> Form | None:
    if any(all(name in value for name in names) for names in _CORNERS):
        return "box"
    return "point" if "x" in value and "y" in value and "width" not in value and "w" not in value else None


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        # A number of hundreds of digits is no float, and outside of every picture.
        return float(value) if isinstance(value, float) or abs(value) < 2**53 else math.inf
    if isinstance(value, str) and re.fullmatch(rf"\s*{_NUMBER}\s*", value):
        return float(value)
    return None


def _listed(text: str) -> object:
    """Return what a string of coordinates holds as a list, such as "112, 340, 520, 410"; else None."""
    numbers = re.findall(_NUMBER, text)
    bare = re.sub(_NUMBER, "", text)
    return [float(number) for number in numbers] if numbers and not bare.strip(" ,;[]()\t\n") else None


def _corner_by_corner(value: Sequence[object]) -> list[object] | None:
    """Return the four numbers of `[[x1, y1], [x2, y2]]`; None of anything else."""
    pairs = [item for item in value if isinstance(item, list) and len(item) == 2 and _is_place(item)]
    return [*pairs[0], *pairs[1]] if len(pairs) == len(value) == 2 else None


def _is_place(value: Sequence[object]) -> bool:
    """True of two or four scalars, of which one at least is a number: an attempt at a point or a box."""
    scalars = all(isinstance(item, str | int | float) or item is None for item in value)
    return scalars and any(_number(item) is not None for item in value)


def _form_of(value: Sequence[object], form: Form) -> Form:
    return {2: "point", 4: "box"}.get(len(value), form)  # type: ignore[return-value]


def below(path: str, name: object) -> str:
    """Return the path of what is called `name` in what lies at `path`: `parts.0.where`."""
    return f"{path}.{name}" if path else str(name)
