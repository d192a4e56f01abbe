"""Answers with places in them: boxes and points as fields of a schema, and the evidence of each field.

A schema names them `{"format": "box"}` (as `Box` does). The model is asked for coordinates in its own convention, and
what it wrote is mapped to pixels of the original before it is validated, so that a schema never sees a model's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, cast
from urllib.parse import unquote

from qvl.backends.schema_bounds import at_pointer, mapped
from qvl.errors import ConfigError
from qvl.evidence.coordinates import Frame
from qvl.evidence.locate import brief, coordinates_schema, placed
from qvl.evidence.read_shapes import Form, below, raw_shapes
from qvl.evidence.shapes import SHAPES, Box, Located, Point
from qvl.types import JsonMapping, JsonObject

EVIDENCE: Final = "evidence"
PAGE_OF: Final = "page_of"
"""The field in which a model tells the page of each other field, where several pages are shown."""
_FORMS: Final = frozenset(SHAPES)
_DEEPEST: Final = 64
_ASKED: Final = {"box": "box [x1, y1, x2, y2] on the picture", "point": "point [x, y] on the picture"}
Visit: TypeAlias = Callable[[Form, object, str, bool], object]
"""Gets the form, the value and the path of a box or point in an answer, and whether it may be null; returns what stands
there instead."""


def form_of(node: object) -> Form | None:
    """Return "box" or "point" of a schema that stands for one, else None."""
    if not isinstance(node, Mapping) or node.get("format") not in _FORMS:
        return None
    return cast("Form", node["format"]) if node.get("type", "object") in ("object", "array") else None


def has_shapes(schema: object) -> bool:
    """True if a box or point is anywhere in a schema."""
    if isinstance(schema, Mapping):
        return form_of(schema) is not None or any(map(has_shapes, schema.values()))
    return isinstance(schema, list | tuple) and any(map(has_shapes, schema))


def with_told_shapes(schema: JsonObject) -> JsonObject:
    """Return `schema` with each box and point as `Box.to_json` tells it; `schema` itself if it has none."""

    def tell(node: JsonObject) -> JsonObject:
        form = form_of(node)
        return node if form is None else {**node, **SHAPES[form].json_schema()}

    apart = mapped(schema, _null_apart)
    return mapped(apart, tell) if has_shapes(apart) else schema


def _null_apart(node: JsonObject) -> JsonObject:
    """Return a box or point whose type is `["array", "null"]` as a union of a place and null."""
    kinds = node.get("type")
    if node.get("format") not in _FORMS or not isinstance(kinds, list) or "null" not in kinds:
        return node
    places = [{**node, "type": kind} for kind in kinds if kind != "null"]
    return {"anyOf": [*places, {"type": "null"}]}


@dataclass(slots=True)
class ReadAnswer:
    """An answer with its places mapped: its own fields, and the evidence of each where that was asked for.

    `wholes` are the paths (in the model's answer) of all places, `faults` tell of those that a field of the schema
    needs and that are none, `notes` of what was cut or left out.
    """

    value: JsonObject
    evidence: dict[str, Located | None] = field(default_factory=dict)
    wholes: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of an answer with places in it.

    Args:
        schema: the schema of the answer as its user reads it.
        frames: of the request's pictures.
        fields: the names of the answer's fields, in order, if the evidence of each is asked for; else empty.
        pages: the numbers of the pages that are shown, if the page of each field is asked for; else empty.
    """

    schema: JsonObject
    frames: tuple[Frame, ...]
    fields: tuple[str, ...] = ()
    pages: tuple[int, ...] = ()

    def asked(self) -> JsonObject:
        """Return the schema that the model's answer must follow."""
        asked = mapped(self.schema, self._ask)
        if self.pages:
            page = {"anyOf": [{"type": "integer", "enum": list(self.pages)}, {"type": "null"}]}
            names = list(asked.get("properties") or ())
            told = {"type": "object", "properties": dict.fromkeys(names, page), "required": names}
            return _with_last(asked, PAGE_OF, {**told, "additionalProperties": False})
        if not self.fields:
            return asked
        place = self._place("box")
        evidence = {
            "type": "object",
            "properties": {name: {"anyOf": [place, {"type": "null"}]} for name in self.fields},
            "required": list(self.fields),
            "additionalProperties": False,
        }
        return _with_last(asked, EVIDENCE, evidence)

    def _ask(self, node: JsonObject) -> JsonObject:
        form = form_of(node)
        if form is None:
            return node
        words = (node.get("description"), f"{_ASKED[form]}, {self._numbers()}")
        told = {name: value for name, value in node.items() if name == "title"}
        return {**told, "description": ": ".join(filter(None, words)), **self._place(form)}

    def _numbers(self) -> str:
        # In pixels the numbers end with the picture; their bound in the schema says so.
        return "coordinates from 0 to 1000" if self.frames[0].relative else "coordinates in pixels"

    def _place(self, form: Form) -> JsonObject:
        places = [coordinates_schema(frame, form) for frame in self.frames]
        largest = max(places, key=lambda place: place["items"]["maximum"])
        if len(self.frames) == 1:
            return largest
        name = "bbox_2d" if form == "box" else "point_2d"
        return {
            "type": "object",
            "properties": {"picture": {"type": "integer", "minimum": 1, "maximum": len(self.frames)}, name: largest},
            "required": ["picture", name],
            "additionalProperties": False,
        }

    def read(self, data: JsonObject) -> ReadAnswer:
        """Return the model's answer with each place in pixels of the original."""
        added = EVIDENCE if self.fields else PAGE_OF if self.pages else None
        own = data if added is None else {name: value for name, value in data.items() if name != added}
        read = ReadAnswer(own)
        if self.pages and isinstance(numbers := data.get(PAGE_OF), Mapping):
            read.pages = {str(name): number for name, number in numbers.items() if number in self.pages}

        def place(form: Form, value: object, path: str, optional: bool) -> object:
            shape, told = self._shape(form, value, path)
            if shape is None and optional:
                read.notes.append(f"left out {told}")
                return None
            if shape is None:
                read.faults.append(told)
                return value
            read.wholes.add(path)
            if told:
                read.notes.append(told)
            return shape.to_json()

        if has_shapes(self.schema):
            read.value = cast("JsonObject", visit_shapes(own, self.schema, place))
        if self.fields:
            told = data.get(EVIDENCE)
            for name in self.fields:
                read.evidence[name] = self._evidence(name, told, read)
            if not isinstance(told, Mapping):
                read.notes.append("the answer has no evidence")
        return read

    def _evidence(self, name: str, told: object, read: ReadAnswer) -> Located | None:
        path = f"{EVIDENCE}.{name}"
        read.wholes.add(path)
        value = told.get(name) if isinstance(told, Mapping) else None
        if value is None:
            return None
        shape, note = self._shape("box", value, path)
        if note:
            read.notes.append(note if shape is not None else f"left out {note}")
        return None if shape is None else Located(name, box=cast("Box", shape))

    def _shape(self, form: Form, value: object, path: str) -> tuple[Box | Point | None, str]:
        """Return (the box or point that a value stands for, what there is to tell about it)."""
        shapes = raw_shapes(value, form)
        raw = next(iter(shapes), None)
        written = f"{brief(value)} for {path!r}"
        if raw is None or raw.form != form:
            return None, f"{written}: not a {form}"
        if len(self.frames) > 1 and raw.picture is None:
            return None, f"{written}: it does not say on which picture"
        number = 1 if raw.picture is None or len(self.frames) == 1 else raw.picture
        if not 1 <= number <= len(self.frames):
            return None, f"{written}: there is no picture {number}"
        shape, told = placed(raw, self.frames[number - 1])
        if shape is None:
            return None, f"{written}: {told}"
        words = [told, f"the first of {len(shapes)} is taken" if len(shapes) > 1 else ""]
        told = ", ".join(filter(None, words))
        return shape, f"{told}: {written}" if told else ""


def _with_last(schema: JsonObject, name: str, node: JsonObject) -> JsonObject:
    """Return the schema with one more field, the last, that every answer has."""
    properties = {**schema.get("properties", {}), name: node}
    return {**schema, "properties": properties, "required": [*schema.get("required", ()), name]}


def evidence_fields(schema: JsonObject) -> tuple[str, ...]:
    """Return the names of the fields of an answer, in order.

    Raises:
        ConfigError: the schema names no fields, or has one of the name `evidence`.
    """
    names = tuple(schema.get("properties") or ())
    if not names:
        raise ConfigError("evidence needs a schema with named fields", hint="give it properties", param="evidence")
    if EVIDENCE in names:
        what = "the schema has a field 'evidence' of its own, which evidence=True would add"
        raise ConfigError(what, hint="rename the field", param="evidence")
    return names


def shapes_in(data: object, schema: JsonObject) -> Iterator[tuple[str, Box | Point]]:
    """Yield (path, box or point) of every place in a mapped answer."""
    found: list[tuple[str, Box | Point]] = []

    def note(form: Form, value: object, path: str, optional: bool) -> object:
        found.append((path, SHAPES[form].from_json(value)))
        return value

    if has_shapes(schema):
        visit_shapes(data, schema, note)
    yield from found


def visit_shapes(data: object, schema: JsonMapping, visit: Visit) -> object:
    """Return `data` with every value that `schema` says is a box or point replaced by what `visit` returns."""
    return _visit(data, schema, schema, visit, "", _DEEPEST)


def _visit(
    data: object, node: object, root: JsonMapping, visit: Visit, path: str, depth: int, *, optional: bool = False
) -> object:
    if depth < 0 or not isinstance(node, Mapping) or data is None:
        return data
    form = form_of(node)
    if form is not None:
        return visit(form, data, path, optional)
    if isinstance(node.get("$ref"), str):
        target = at_pointer(root, unquote(node["$ref"]))
        data = _visit(data, target, root, visit, path, depth - 1, optional=optional)
    for part in node.get("allOf") or ():
        data = _visit(data, part, root, visit, path, depth - 1, optional=optional)
    for word in ("anyOf", "oneOf"):
        parts = list(node.get(word) or ())
        null = optional or any(isinstance(part, Mapping) and part.get("type") == "null" for part in parts)
        branches = [part for part in parts if _could_be(data, part, root)]
        if null and not branches:
            # What is no place at all is none, where there need not be one.
            branches = [part for part in parts if _forms(part, root)]
        if branches:
            # Two numbers are a point where there may be a box or a point.
            branch = next((part for part in branches if _is_exactly(data, part, root)), branches[0])
            data = _visit(data, branch, root, visit, path, depth - 1, optional=null)
    if isinstance(data, Mapping):
        properties, more = node.get("properties") or {}, node.get("additionalProperties")
        return {
            name: _visit(value, properties.get(name, more), root, visit, below(path, name), depth - 1)
            for name, value in data.items()
        }
    if isinstance(data, list):
        first: Sequence[object] = node.get("prefixItems") or ()
        return [
            _visit(item, first[at] if at < len(first) else node.get("items"), root, visit, below(path, at), depth - 1)
            for at, item in enumerate(data)
        ]
    return data


_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": (int, float),
    "boolean": bool,
}


def _is_exactly(data: object, node: object, root: JsonMapping) -> bool:
    return any(raw.form == form for form in _forms(node, root) for raw in raw_shapes(data, form))


def _forms(node: object, root: JsonMapping) -> set[Form]:
    """Return the forms that a schema itself may stand for, through references and unions, not those in its fields."""
    found: set[Form] = set()
    left, seen = [node], set()
    while left:
        part = left.pop()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        if (form := form_of(part)) is not None:
            found.add(form)
            continue
        if isinstance(part.get("$ref"), str):
            left.append(at_pointer(root, unquote(part["$ref"])))
        left += [inner for word in ("anyOf", "oneOf", "allOf") for inner in part.get(word) or ()]
    return found


def _could_be(data: object, node: object, root: JsonMapping) -> bool:
    """True if `data` may be what a branch of a union stands for: its type, its required names, its constants."""
    if not isinstance(node, Mapping):
        return node is not False
    for _ in range(8):
        if not isinstance(node.get("$ref"), str):
            break
        target = at_pointer(root, unquote(node["$ref"]))
        if not isinstance(target, Mapping):
            return True
        node = target
    form = form_of(node)
    if form is not None:
        return bool(raw_shapes(data, form))
    kinds = node.get("type")
    known = [_TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds or ()) if kind in _TYPES]
    if kinds is not None and not any(isinstance(data, kind) for kind in known):
        return False
    if "const" in node and node["const"] != data:
        return False
    if isinstance(node.get("enum"), list) and data not in node["enum"]:
        return False
    if isinstance(data, Mapping):
        properties = node.get("properties") or {}
        return all(name in data for name in node.get("required") or ()) and all(
            _could_be(value, properties[name], root) for name, value in data.items() if name in properties
        )
    return True
