"""Training of the bundled model from scratch: draws pictures, trains the tower, then the whole network, and exports.

The comparison of two pictures' colours is learnt with a frozen tower; the fourth stage trains everything at a smaller
learning rate, on mostly oblong pictures. Two more stages teach boxes, the tower first, then the whole network among all
of the older questions; some of their pictures are noisy, hide things, or bear a brand that no other picture has.

    python -m training.train --out DIR [--steps N] [--device cpu] [--workers 2]
    python -m training.train --out DIR --from src/qvl/tiny/weights    # only the stages that teach boxes

DIR gets the exported checkpoint in `weights/` and the state every few hundred steps: the same command resumes there.
Training seeds start at `qvl.tiny.FIRST_TRAINING_SEED`; everything below is held out for evaluation and tests.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from training.workers import Team

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training.pictures import PictureStore

SEED: Final = 1
FIRST_PICTURES: Final = 4_000
PICTURES: Final = 60_000
VISION_STEPS: Final = 3_200
STEPS: Final = 2_400
HEADS_WEIGHT: Final = 0.3


COMPARING: Final[dict[str, Any]] = {
    "pictures": 30,
    "analyses": 4,
    "questions": 5,
    "conversations": 2,
    "comparisons": 26,
}
LOCATING: Final[dict[str, Any]] = {
    "pictures": 32,
    "analyses": 3,
    "questions": 3,
    "conversations": 1,
    "comparisons": 2,
    "locations": 28,
    "evidences": 2,
}


@dataclass(frozen=True, slots=True)
class Course:
    """One stage: its length as a share of the plan's steps, of the tower's own steps if it trains the `tower` alone.

    `menu` is what is asked, `vision_share` the tower's share of the rate, `peak` the highest rate, `oblong` the share
    of oblong pictures. A `located` course teaches boxes too, on the second store's pictures.
    """

    share: float
    peak: float
    oblong: float
    vision_share: float = 1.0
    menu: dict[str, Any] = field(default_factory=dict)
    tower: bool = False
    located: bool = False


COURSES: Final = (
    Course(1.0, 1e-3, 0.5, tower=True),
    Course(0.45, 1e-3, 0.25, 0.5),
    Course(0.2, 1e-3, 0.25, 0.0, COMPARING),
    Course(0.35, 5e-4, 0.6, 0.7),
    Course(4.0, 1e-3, 0.75, tower=True, located=True),
    Course(4.0, 1e-3, 0.75, 0.3, LOCATING, located=True),
)
FIRST_LOCATED: Final = next(number for number, course in enumerate(COURSES, start=1) if course.located)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training run: its output folder, the number of pictures, and the length of each stage."""

    out: Path
    pictures: int = PICTURES
    vision_steps: int = VISION_STEPS
    steps: int = STEPS
    workers: int = 1
    device: str = "cpu"
    start: Path | None = None

    def stage(self, number: int, *, part: bool = False) -> Path:
        """Return the path of the state after (or, as `part`, within) stage `number`; its name depends on the plan."""
        name = f"{self.pictures}-{self.vision_steps}-{self.steps}-{self.workers}"
        return self.out / f"stage-{number}-of-{name}{'.part' if part else ''}.pt"

    def length(self, course: Course) -> int:
        """Return the number of steps of a stage."""
        return max(1, round(course.share * (self.vision_steps if course.tower else self.steps)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan of the command line arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, checkpoints and weights/")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="pictures drawn for training")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="steps of the vision tower alone")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the whole network")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--from", dest="start", type=Path, help="checkpoint to start from: only the stages that teach boxes are run"
    )
    options = parser.parse_args(arguments)
    options.workers = options.workers if options.device == "cpu" else 1
    run(TrainingPlan(**vars(options)))
    return 0


def run(plan: TrainingPlan) -> None:
    """Draw in one process and train in `plan.workers` others; raise RuntimeError if one of them fails."""
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / "meeting").unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    painter = spawn.Process(target=_paint, args=(plan,), daemon=True)
    workers = [spawn.Process(target=_work, args=(plan, rank)) for rank in range(plan.workers)]
    painter.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    painter.terminate()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"workers ended with {[worker.exitcode for worker in workers]}")


def _stores(plan: TrainingPlan) -> list[PictureStore]:
    """Return the stores of the plain and of the located stages' pictures."""
    from training.pictures import PictureStore

    return [
        PictureStore(plan.out / "pictures", plan.pictures),
        PictureStore(plan.out / "harder-pictures", plan.pictures, harder=True),
    ]


def _paint(plan: TrainingPlan) -> None:
    for store in _stores(plan)[plan.start is not None :]:
        store.fill()


def _work(plan: TrainingPlan, rank: int) -> None:
    import torch

    from training import vocabulary
    from training.export import export, load
    from training.language_stage import Menu, train_language
    from training.network import build
    from training.pointers import Pointers
    from training.rows import RowWriter
    from training.vision_stage import Heads, train_vision

    torch.set_default_device(plan.device)
    team = Team(rank, plan.workers)
    team.join((plan.out / "meeting").absolute())
    stores = _stores(plan)
    tokenizer = vocabulary.train()
    writer = RowWriter(lambda text: list(tokenizer.encode(text).ids))
    model, number, first_step = build(SEED), 1, 0
    heads: Heads | Pointers = Heads()
    if plan.start is not None:
        model.load_state_dict(load(plan.start))
        number = FIRST_LOCATED
    for done in range(len(COURSES), 0, -1):
        paths = [path for path in (plan.stage(done), plan.stage(done, part=True)) if path.is_file()]
        if paths:
            state = torch.load(paths[0], map_location=plan.device, weights_only=True)
            number, first_step = (done, state["step"]) if state["step"] else (done + 1, 0)
            if done >= FIRST_LOCATED and isinstance(heads, Heads):
                heads = Pointers(heads)
            model.load_state_dict(state["model"])
            heads.load_state_dict(state["heads"])
            break

    def report(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    def keep(path: Path, step: int) -> None:
        if rank == 0:
            export(model.state_dict(), tokenizer, plan.out / "weights")
            new = plan.out / "stage.new"
            torch.save({"model": model.state_dict(), "heads": heads.state_dict(), "step": step}, new)
            new.replace(path)

    while number <= len(COURSES):
        course = COURSES[number - 1]
        if course.located and isinstance(heads, Heads):
            heads = Pointers(heads)
        store = stores[course.located]
        store.wait_for(min(FIRST_PICTURES, plan.pictures // 2))
        report(f"stage {number} of {len(COURSES)}" + (f", from {first_step}" if first_step else ""))
        part = plan.stage(number, part=True)
        given: dict[str, Any] = {
            "steps": plan.length(course),
            "first_step": first_step,
            "peak": course.peak,
            "oblong": course.oblong,
            "seed": SEED + max(0, number - 2),
            "report": report,
            "save": functools.partial(keep, part),
        }
        if course.tower:
            train_vision(model.model.visual, heads, store, team, batch=max(1, 64 // plan.workers), **given)
        else:
            train_language(
                model,
                heads,
                store,
                writer,
                team,
                menu=Menu(**course.menu).times(2 / plan.workers),
                vision_share=course.vision_share,
                heads_weight=HEADS_WEIGHT if course.vision_share else 0.0,
                **given,
            )
        keep(plan.stage(number), 0)
        part.unlink(missing_ok=True)
        number, first_step = number + 1, 0
    team.leave()


if __name__ == "__main__":
    raise SystemExit(main())
