"""Results with places as data sets of labelling and training tools: COCO, YOLO and Label Studio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from qvl.errors import ConfigError
from qvl.evidence.shapes import SHAPES, Box, Located, Point
from qvl.types import JsonMapping, JsonObject

FORMATS: Final = ("coco", "yolo", "label-studio")
_DEEPEST: Final = 64


@dataclass(slots=True)
class ExportedPicture:
    """A picture of a data set: its name, its size in pixels (upright), and what is located on it."""

    name: str
    width: int
    height: int
    located: list[Located] = field(default_factory=list)


@dataclass(slots=True)
class ExportedSet:
    """The pictures of result files by name, in order, and the numbers of lines that brought none."""

    pictures: dict[str, ExportedPicture] = field(default_factory=dict)
    failed: int = 0
    placeless: int = 0

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of their first use."""
        return list(dict.fromkeys(item.label for picture in self.pictures.values() for item in picture.located))

    @property
    def points(self) -> int:
        return sum(item.point is not None for picture in self.pictures.values() for item in picture.located)


def read_results(lines: Iterable[str], name: str, into: ExportedSet) -> None:
    """Add the JSON lines that `qvl locate` and `qvl analyze` write to `into`; a later line of a picture wins.

    Raises:
        ConfigError: a line is not a result of theirs; the message has its number.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as exc:
            raise _bad(name, number, f"is not JSON: {exc}") from exc
        if not isinstance(record, dict) or not isinstance(record.get("picture"), str):
            raise _bad(name, number, "is not a result of qvl locate or qvl analyze")
        if record.get("ok") is False:
            into.failed += 1
            continue
        try:
            located = list(_located(record))
        except ConfigError as exc:
            raise _bad(name, number, f"has a wrong place: {exc.message}") from None
        if any(item.shape.picture for item in located):
            raise _bad(name, number, "is about several pictures at once; such results have no one file each")
        size = (record.get("width"), record.get("height"))
        if located:
            size = (located[0].shape.width, located[0].shape.height)
        if not all(isinstance(pixels, int) and pixels > 0 for pixels in size):
            into.placeless += 1
            continue
        into.pictures[record["picture"]] = ExportedPicture(record["picture"], *size, located)  # type: ignore[arg-type]


def _bad(name: str, number: int, what: str) -> ConfigError:
    hint = "write one with qvl locate … --output results.jsonl, or qvl analyze --evidence"
    return ConfigError(f"{name}:{number} {what}", hint=hint)


def _located(record: JsonMapping) -> Iterator[Located]:
    for item in record.get("located") or ():
        if isinstance(item, dict):
            yield Located.from_json(item)
    evidence = record.get("evidence")
    for item in evidence.values() if isinstance(evidence, Mapping) else ():
        if isinstance(item, dict):
            yield Located.from_json(item)
    sure = record.get("field_confidence")
    yield from _fields(record.get("analysis"), "", sure if isinstance(sure, Mapping) else {}, _DEEPEST)


def _fields(value: object, path: str, sure: JsonMapping, depth: int) -> Iterator[Located]:
    """The boxes and points among the fields of an analysis; the label is the path without numbers of items."""
    if depth < 0:
        return
    if isinstance(value, Mapping):
        for form, kind in SHAPES.items():
            if {*kind.names, "width", "height", "relative"} <= value.keys():
                label = ".".join(step for step in path.split(".") if not step.isdigit()) or form
                shape = kind.from_json(value)
                yield Located(label, **{form: shape}, confidence=sure.get(path))  # type: ignore[arg-type]
                return
        for name, inner in value.items():
            yield from _fields(inner, f"{path}.{name}" if path else str(name), sure, depth - 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _fields(inner, f"{path}.{number}" if path else str(number), sure, depth - 1)


def coco(data: ExportedSet) -> JsonObject:
    """Return the set in COCO's form of object detection; `score` is the confidence, where there is one."""
    categories = {label: number for number, label in enumerate(data.labels, start=1)}
    images, annotations = [], list[JsonObject]()
    for number, picture in enumerate(data.pictures.values(), start=1):
        images.append({"id": number, "file_name": picture.name, "width": picture.width, "height": picture.height})
        for item in picture.located:
            box = _box(item)
            edges = [box.x1, box.y1, round(box.x2 - box.x1, 2), round(box.y2 - box.y1, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories[item.label],
                    "bbox": edges,
                    "area": round(box.area, 2),
                    "iscrowd": 0,
                    "segmentation": [],
                    **({} if item.confidence is None else {"score": item.confidence}),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": label, "supercategory": ""} for label, number in categories.items()],
    }


def yolo(data: ExportedSet) -> dict[str, str]:
    """Return the set as YOLO's files by name: `data.yaml` with the classes, and a file of labels for each picture.

    Raises:
        ConfigError: two pictures have the same file name without its ending.
    """
    classes = {label: number for number, label in enumerate(data.labels)}
    names = "".join(f"  {number}: {json.dumps(label, ensure_ascii=False)}\n" for label, number in classes.items())
    files = {"data.yaml": f"path: .\ntrain: images\nval: images\nnames:\n{names}" if names else "names: {}\n"}
    owners: dict[str, str] = {}
    for picture in data.pictures.values():
        name, of_page, page = picture.name.partition("#page=")
        stem = PurePath(name.partition("?")[0]).stem or "picture"
        stem += f"-page-{page}" if of_page else ""
        if stem in owners:
            what = f"{owners[stem]} and {picture.name} would both be labels/{stem}.txt"
            raise ConfigError(what, hint="rename one, or export each folder for itself")
        owners[stem] = picture.name
        lines = []
        for item in picture.located:
            x1, y1, x2, y2 = _box(item).relative
            place = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            lines.append(" ".join([str(classes[item.label]), *(f"{share:.6f}" for share in place)]) + "\n")
        files[f"labels/{stem}.txt"] = "".join(lines)
    return files


def label_studio(data: ExportedSet, model: str = "qvl") -> list[JsonObject]:
    """Return the set as tasks of Label Studio with predictions: rectangles and points in per cent of the picture."""
    tasks = []
    for picture in data.pictures.values():
        sure = [item.confidence for item in picture.located if item.confidence is not None]
        prediction: JsonObject = {
            "model_version": model,
            "result": [_region(item, number) for number, item in enumerate(picture.located, start=1)],
            **({"score": min(sure)} if sure else {}),
        }
        tasks.append({"data": {"image": picture.name}, "predictions": [prediction]})
    return tasks


def _region(item: Located, number: int) -> JsonObject:
    shape = item.shape
    per_cent = [round(100 * share, 4) for share in shape.relative]
    if isinstance(shape, Point):
        kind, place = "keypointlabels", {"x": per_cent[0], "y": per_cent[1], "width": 0.5}
    else:
        x1, y1, x2, y2 = per_cent
        kind = "rectanglelabels"
        place = {"x": x1, "y": y1, "width": round(x2 - x1, 4), "height": round(y2 - y1, 4), "rotation": 0}
    return {
        "id": f"r{number}",
        "type": kind,
        "from_name": "label" if kind == "rectanglelabels" else "point",
        "to_name": "image",
        "original_width": shape.width,
        "original_height": shape.height,
        "image_rotation": 0,
        "value": {**place, kind: [item.label]},
        **({} if item.confidence is None else {"score": item.confidence}),
    }


def label_config(labels: Sequence[str]) -> str:
    """Return the labelling interface of Label Studio in which `label_studio` tasks are shown."""
    from html import escape

    tags = "".join(f'    <Label value="{escape(label)}"/>\n' for label in labels)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{tags}  </RectangleLabels>\n'
        f'  <KeyPointLabels name="point" toName="image">\n{tags}  </KeyPointLabels>\n</View>\n'
    )


def _box(item: Located) -> Box:
    if item.box is None:
        raise ConfigError(f"{item.label!r} is a point, which this format has no place for", hint="label-studio has")
    return item.box
