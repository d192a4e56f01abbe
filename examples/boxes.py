"""Boxes on pictures: locate the brand and the product, draw them, crop them, and write them as a COCO data set.

    python examples/boxes.py [FOLDER] [MODEL]

FOLDER takes `*-boxes.png` and `boxes.json`; MODEL is the bundled one unless named, as "Qwen/Qwen3-VL-4B-Instruct".
"""

import json
import sys
from pathlib import Path

from qvl import Pipeline
from qvl.evidence.export import ExportedPicture, ExportedSet, coco

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*-*.png"))


def main(folder: Path, model: str | None) -> None:
    data = ExportedSet()
    with Pipeline(model) as pipe:
        for item in pipe.map(PICTURES, locate=["the brand", "the product"], keep_pictures=True):
            if item.value is None:
                print(f"{item.source}: {item.error}", file=sys.stderr)
                continue
            found, path = item.value, Path(str(item.source))
            for one in found:
                sure = "" if one.confidence is None else f", {one.confidence:.0%} sure"
                print(f"{path.name}: {one.label} at {one.box.pixels if one.box else ''}{sure}")
            for note in found.result.notes:
                print(f"{path.name}: {note}")
            (folder / f"{path.stem}-boxes.png").write_bytes(found.overlay())
            data.pictures[path.name] = ExportedPicture(path.name, *found.pictures[0].original, list(found))
    (folder / "boxes.json").write_text(json.dumps(coco(data), indent=1), encoding="utf-8")
    print(f"{folder / 'boxes.json'}: {len(data.pictures)} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), sys.argv[2] if len(sys.argv) > 2 else None)
