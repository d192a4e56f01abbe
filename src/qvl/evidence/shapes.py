"""Boxes and points on a picture, in pixels of the original; a target with the place where it was located."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from qvl.errors import ConfigError
from qvl.types import JsonObject

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

S = TypeVar("S", bound="Shape")
# Of a coordinate in pixels, in what is stored and told.
DECIMALS: Final = 2
# What is derived from the others when a shape is told as JSON.
_DERIVED: Final = frozenset({"relative"})


class Shape:
    """The common part of `Box` and `Point`: coordinates checked against a size, JSON, and their use in schemas.

    A class or dataclass with a field of such a type is a schema of `analyze()`; in a JSON schema of a user's it is
    `{"format": "box"}` or `{"format": "point"}`.
    """

    __slots__ = ()
    form: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    width: int
    height: int
    picture: int
    clipped: bool

    def __post_init__(self) -> None:
        for name in ("width", "height", "picture"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "picture"):
                raise ConfigError(f"{name}={value!r} of a {self.form} is out of range", hint="a whole number of pixels")
        for name in self.names:
            value, limit = getattr(self, name), self.width if name.startswith("x") else self.height
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r} of a {self.form} is not a number", hint="pixels of the picture")
            if not 0 <= value <= limit:
                what = f"{name}={value:g} of a {self.form} is outside of the picture of {self.width} x {self.height}"
                raise ConfigError(what, hint=f"from 0 to {limit}")
            object.__setattr__(self, name, round(float(value), DECIMALS))

    @property
    def relative(self) -> tuple[float, ...]:
        """The coordinates as fractions of the picture's width and height, 0 to 1."""
        return tuple(getattr(self, name) / (self.width if name.startswith("x") else self.height) for name in self.names)

    def to_json(self) -> JsonObject:
        """Return the shape as JSON: pixels, the picture's size, and `relative`; `picture` is its number, from 0."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {**told, "relative": [round(share, 6) for share in self.relative]}

    @classmethod
    def from_json(cls: type[S], data: object) -> S:
        """Return the shape that `to_json` told.

        Raises:
            ConfigError: another form, or coordinates outside of the picture.
        """
        if isinstance(data, cls):
            return data
        hint = f"{', '.join((*cls.names, 'width', 'height'))}, in pixels of the picture"
        if not isinstance(data, Mapping):
            raise ConfigError(f"not a {cls.form} within the picture", hint=hint)
        values = {name: value for name, value in data.items() if name not in _DERIVED}
        try:
            return cls(**values)
        except TypeError as exc:
            raise ConfigError(f"not a {cls.form} of a picture", hint=hint) from exc

    @classmethod
    def json_schema(cls) -> JsonObject:
        """Return the schema of `to_json`."""
        pixels = {name: {"type": "number", "minimum": 0} for name in cls.names}
        size = {name: {"type": "integer", "minimum": 1} for name in ("width", "height")}
        share = {"type": "number", "minimum": 0, "maximum": 1}
        return {
            "type": "object",
            "format": cls.form,
            "properties": {
                **pixels,
                **size,
                "picture": {"type": "integer", "minimum": 0},
                "clipped": {"type": "boolean"},
                "relative": {"type": "array", "items": share},
            },
            "required": [*cls.names, "width", "height"],
            "additionalProperties": False,
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> CoreSchema:
        from pydantic_core import core_schema

        told = core_schema.plain_serializer_function_ser_schema(cls.to_json)
        return core_schema.no_info_plain_validator_function(cls.from_json, serialization=told)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: object, handler: object) -> JsonObject:
        return cls.json_schema()


@dataclass(frozen=True, slots=True)
class Point(Shape):
    """A point of a picture: `x` and `y` in pixels of the original (EXIF applied), from its upper left corner.

    Args:
        width: of the original picture, in pixels; `height` likewise.
        picture: the picture's number among those of the request, from 0.
        clipped: it is the middle of a box that was clipped.

    Raises:
        ConfigError: not a number, or outside of the picture.
    """

    form: ClassVar[str] = "point"
    names: ClassVar[tuple[str, ...]] = ("x", "y")
    x: float
    y: float
    width: int
    height: int
    picture: int = 0
    clipped: bool = False

    def in_crop(self, crop: Box) -> Point:
        """Return this point of a picture that was cut out at `crop`, as a point of the whole picture."""
        x, y = self.relative
        return Point(
            crop.x1 + x * (crop.x2 - crop.x1),
            crop.y1 + y * (crop.y2 - crop.y1),
            crop.width,
            crop.height,
            crop.picture,
            self.clipped,
        )


@dataclass(frozen=True, slots=True)
class Box(Shape):
    """A box on a picture: its left, upper, right and lower edge in pixels of the original (EXIF applied).

    Args:
        width: of the original picture, in pixels; `height` likewise.
        picture: the picture's number among those of the request, from 0.
        clipped: the model's box reached beyond the picture and was cut at its edges.

    Raises:
        ConfigError: not a number, outside of the picture, or without an area.
    """

    form: ClassVar[str] = "box"
    names: ClassVar[tuple[str, ...]] = ("x1", "y1", "x2", "y2")
    x1: float
    y1: float
    x2: float
    y2: float
    width: int
    height: int
    picture: int = 0
    clipped: bool = False

    def __post_init__(self) -> None:
        # By name: the class that slots are made for is another one than this.
        Shape.__post_init__(self)
        if self.x1 >= self.x2 or self.y1 >= self.y2:
            what = f"a box from {self.x1:g}, {self.y1:g} to {self.x2:g}, {self.y2:g} has no area"
            raise ConfigError(what, hint="x1 is left of x2, y1 above y2")

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """(left, upper, right, lower) in whole pixels that hold the box, as `PIL.Image.crop` takes them."""
        return math.floor(self.x1), math.floor(self.y1), math.ceil(self.x2), math.ceil(self.y2)

    @property
    def area(self) -> float:
        """The area in pixels."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    @property
    def center(self) -> Point:
        """The point in its middle."""
        x, y = (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2
        return Point(x, y, self.width, self.height, self.picture, self.clipped)

    def iou(self, other: Box) -> float:
        """Return the area that both boxes cover over the area that either does, 0 to 1; 0 on different pictures."""
        if self.picture != other.picture:
            return 0.0
        across = min(self.x2, other.x2) - max(self.x1, other.x1)
        down = min(self.y2, other.y2) - max(self.y1, other.y1)
        both = max(0.0, across) * max(0.0, down)
        return both / (self.area + other.area - both)

    def in_crop(self, crop: Box) -> Box:
        """Return this box of a picture that was cut out at `crop` (a tile), as a box of the whole picture."""
        low, high = Point(self.x1, self.y1, self.width, self.height), Point(self.x2, self.y2, self.width, self.height)
        low, high = low.in_crop(crop), high.in_crop(crop)
        return Box(low.x, low.y, high.x, high.y, crop.width, crop.height, crop.picture, self.clipped)


SHAPES: Final[Mapping[str, type[Box] | type[Point]]] = {"box": Box, "point": Point}


@dataclass(frozen=True, slots=True)
class Located:
    """A target and where it is: exactly one of `box` and `point`.

    `confidence` is the probability (0 to 1) of the tokens that spell place and label, which says little by itself: many
    numbers lie beside the right one. With a calibration it says how often such boxes are right, `confidence_method` is
    "calibrated", and the probability stands in `raw_confidence`. None where a backend tells no probabilities.

    Raises:
        ConfigError: neither or both of `box` and `point`.
    """

    label: str
    box: Box | None = None
    point: Point | None = None
    confidence: float | None = None
    raw_confidence: float | None = None
    confidence_method: str | None = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.point is None):
            raise ConfigError(f"{self.label!r} needs exactly one of box and point")

    @property
    def shape(self) -> Box | Point:
        """The box, or the point."""
        shape = self.box if self.box is not None else self.point
        assert shape is not None
        return shape

    def to_json(self) -> JsonObject:
        """Return label, `box` or `point`, and confidence as JSON values; the raw one too if it is calibrated."""
        told = {"label": self.label, self.shape.form: self.shape.to_json(), "confidence": self.confidence}
        if self.confidence_method is None:
            return told
        return {**told, "raw_confidence": self.raw_confidence, "confidence_method": self.confidence_method}

    @classmethod
    def from_json(cls, data: JsonObject) -> Located:
        """Return what `to_json` told.

        Raises:
            ConfigError: another form.
        """
        box, point = data.get("box"), data.get("point")
        return cls(
            str(data.get("label", "")),
            None if box is None else Box.from_json(box),
            None if point is None else Point.from_json(point),
            data.get("confidence"),
            data.get("raw_confidence"),
            data.get("confidence_method"),
        )
