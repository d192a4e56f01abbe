"""Whether the bundled model's calibrated confidences hold: on drawn pictures made harder, with brands it never saw.

    .venv/bin/python benchmarks/bench_calibration.py            # some minutes; figures on stdout
    .venv/bin/python benchmarks/bench_calibration.py --plot benchmarks/calibration.png --json calibration.json

One set of pictures makes the calibration and its thresholds; a second one of fresh seeds measures both; a third one
shows brands that no training has seen, and nothing else on the plates. No seed was trained on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from qvl.calibration import Calibration
from qvl.calibration.abstain import Thresholds
from qvl.evaluation.calibrate import CalibrationReport, calibrate, report
from qvl.evaluation.collect import Collected, Collector
from qvl.evaluation.labelled import read_labelled
from qvl.evaluation.measures import wilson
from qvl.evaluation.page import figure, kept_text
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.tiny.render import labels, sample
from qvl.types import JsonObject

SIZE = (256, 256)
DIFFICULTY = 0.8
UNKNOWN = 0.15
PRECISION = 0.95
ABSTAIN = (0.9, 0.95)
# Far below those of the training.
SEEDS = {"calibration": 200_000, "fresh": 400_000, "unknown": 600_000}


def write_set(folder: Path, first: int, count: int, unknown_brands: float, *, branded: bool = False) -> Path:
    """Write `count` pictures with their labels; `branded` leaves out those without a brand."""
    folder.mkdir()
    file = folder / "labels.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        seed = first
        while count:
            product, image = sample(seed, SIZE, difficulty=DIFFICULTY, unknown_brands=unknown_brands)
            if not branded or (product is not None and product.brand is not None):
                image.save(folder / f"{seed}.png")
                lines.write(json.dumps({"image": f"{seed}.png", "expected": labels(product)}) + "\n")
                count -= 1
            seed += 1
    return file


async def collect(file: Path, calibration: Calibration | None = None) -> tuple[Collector, Collected, JsonObject]:
    async with AsyncPipeline(cache="off", calibration=calibration, concurrency=32) as pipeline:
        collector = Collector(pipeline, read_labelled([str(file)]))
        found = await collector.collect()
        # A closed backend no longer knows its device's dtype.
        return collector, found, pipeline.backend.identity()


async def measure(
    labelled: int, fresh: int, unknown: int
) -> tuple[CalibrationReport, CalibrationReport, dict[str, object]]:
    """Return the reports of both sets, and how often an unknown brand is told at each threshold."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = write_set(folder / "calibration", SEEDS["calibration"], labelled, UNKNOWN)
        second = write_set(folder / "fresh", SEEDS["fresh"], fresh, UNKNOWN)
        third = write_set(folder / "unknown", SEEDS["unknown"], unknown, 1.0, branded=True)
        collector, found, identity = await collect(first)
        made, fits = calibrate(collector, found, identity)
        common = {"model": "local:bundled", "files": []}
        fitted = report(found, lines=labelled, fits=fits, precision=PRECISION, **common)  # type: ignore[arg-type]
        least = {
            one.name: one.at_precision.threshold for one in fitted.fields if one.at_precision and one.kind == "field"
        }
        _, found, _ = await collect(second, made)
        checked = report(found, lines=fresh, thresholds=Thresholds(None, least), **common)  # type: ignore[arg-type]
        _, found, _ = await collect(third, made)
        told: dict[str, object] = {}
        wrong = [sample.sure or 0.0 for sample in found.fields["brand"] if not sample.right]
        for name, threshold in (
            ("at precision", least.get("brand", 1.0)),
            *((f"abstain={one}", one) for one in ABSTAIN),
        ):
            silent = sum(sure < threshold for sure in wrong)
            told[name] = {"threshold": threshold, "abstained": silent / len(wrong), "of": len(wrong)}
            told[name] |= {"interval": wilson(silent, len(wrong))}  # type: ignore[operator]
        return fitted, checked, told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labelled", type=int, default=2000, help="pictures of the calibration")
    parser.add_argument("--fresh", type=int, default=1500, help="pictures of fresh seeds")
    parser.add_argument("--unknown", type=int, default=400, help="pictures of brands that were never trained on")
    parser.add_argument("--plot", type=Path, help="write the diagrams of the fresh pictures here")
    parser.add_argument("--json", type=Path, help="write all measures here")
    options = parser.parse_args()
    fitted, checked, told = asyncio.run(measure(options.labelled, options.fresh, options.unknown))
    print("| field | right | ECE raw | ECE calibrated | Brier raw | Brier calibrated | told at 95 % |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for one in checked.fields:
        low, high = one.calibrated.ece_interval
        kept = "" if one.at_threshold is None else kept_text(one.at_threshold)
        print(
            f"| {one.name} | {one.accuracy:.1%} | {one.raw.ece:.3f} | {one.calibrated.ece:.3f} [{low:.3f}, {high:.3f}] "
            f"| {one.raw.brier:.3f} | {one.calibrated.brier:.3f} | {kept} |"
        )
    print(f"\n{fitted.answered} labelled, {checked.answered} fresh pictures answered; unknown brands:")
    for name, facts in told.items():
        print(f"- {name}: {facts}")
    if options.plot:
        figure([one for one in checked.fields if one.name in ("brand", "category")]).savefig(options.plot, dpi=110)
    if options.json:
        both = {"calibration": fitted.to_json(), "fresh": checked.to_json(), "unknown_brands": told}
        options.json.write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
