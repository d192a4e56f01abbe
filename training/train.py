"""Training of the bundled model from scratch: draws pictures, trains the tower, then the whole network, and exports.

The comparison of two pictures' colours is learnt with a frozen tower; the last stage trains everything at a smaller
learning rate, on mostly oblong pictures.

    python -m training.train --out DIR [--steps N] [--device cpu] [--workers 2]

DIR gets the exported checkpoint in `weights/` every few hundred steps, and the state after each of the four stages: the
same command resumes after the last finished one.
Training seeds start at `qvl.tiny.FIRST_TRAINING_SEED`; everything below is held out for evaluation and tests.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from training.workers import Team

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED: Final = 1
FIRST_PICTURES: Final = 4_000
PICTURES: Final = 60_000
VISION_STEPS: Final = 3_200
STEPS: Final = 2_400


# Share of the steps, what is asked, the tower's share of the rate, peak rate, share of oblong pictures.
COMPARING: Final[dict[str, Any]] = {
    "pictures": 30,
    "analyses": 4,
    "questions": 5,
    "conversations": 2,
    "comparisons": 26,
}
COURSES: Final[tuple[tuple[float, dict[str, Any], float, float, float], ...]] = (
    (0.45, {}, 0.5, 1e-3, 0.25),
    (0.2, COMPARING, 0.0, 1e-3, 0.25),
    (0.35, {}, 0.7, 5e-4, 0.6),
)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training run: its output folder, the number of pictures, and the length of each stage."""

    out: Path
    pictures: int = PICTURES
    vision_steps: int = VISION_STEPS
    steps: int = STEPS
    workers: int = 1
    device: str = "cpu"

    def done(self) -> int:
        """Return the number of finished stages of this plan in `out`."""
        stages = [number for number in range(1, len(COURSES) + 2) if self.stage(number).is_file()]
        return max(stages, default=0)

    def stage(self, number: int) -> Path:
        """Return the path of the state after stage `number` (from 1); its name depends on the plan."""
        name = f"{self.pictures}-{self.vision_steps}-{self.steps}-{self.workers}"
        return self.out / f"stage-{number}-of-{name}.pt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan of the command line arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, checkpoints and weights/")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="pictures drawn for training")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="steps of the vision tower alone")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the whole network")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes on a CPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    workers = options.workers if options.device == "cpu" else 1
    run(TrainingPlan(options.out, options.pictures, options.vision_steps, options.steps, workers, options.device))
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


def _paint(plan: TrainingPlan) -> None:
    from training.pictures import PictureStore

    PictureStore(plan.out / "pictures", plan.pictures).fill()


def _work(plan: TrainingPlan, rank: int) -> None:
    import torch

    from training import vocabulary
    from training.export import export
    from training.language_stage import Menu, train_language
    from training.network import build
    from training.pictures import PictureStore
    from training.rows import RowWriter
    from training.vision_stage import Heads, train_vision

    torch.set_default_device(plan.device)
    team = Team(rank, plan.workers)
    team.join((plan.out / "meeting").absolute())
    store = PictureStore(plan.out / "pictures", plan.pictures)
    store.wait_for(min(FIRST_PICTURES, plan.pictures // 2))
    tokenizer = vocabulary.train()
    model, heads = build(SEED), Heads()
    done = plan.done()
    if done:
        state = torch.load(plan.stage(done), map_location=plan.device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])

    def report(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    def save(step: int) -> None:
        if rank == 0:
            export(model.state_dict(), tokenizer, plan.out / "weights")

    def finish(number: int) -> None:
        if rank == 0:
            save(0)
            new = plan.out / "stage.new"
            torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, new)
            new.replace(plan.stage(number))

    if done:
        report(f"going on after stage {done} of {len(COURSES) + 1}")
    else:
        train_vision(
            model.model.visual,
            heads,
            store,
            team,
            steps=plan.vision_steps,
            batch=max(1, 64 // plan.workers),
            peak=1e-3,
            seed=SEED,
            report=report,
            save=save,
        )
        finish(1)
    writer = RowWriter(lambda text: list(tokenizer.encode(text).ids))
    for number, (share, menu, vision_share, peak, oblong) in enumerate(COURSES):
        if number + 2 <= done:
            continue
        report(f"course {number + 1} of {len(COURSES)}")
        train_language(
            model,
            heads,
            store,
            writer,
            team,
            steps=max(1, round(plan.steps * share)),
            first_step=0,
            menu=Menu(**menu).times(2 / plan.workers),
            peak=peak,
            vision_share=vision_share,
            oblong=oblong,
            heads_weight=0.3 if vision_share else 0.0,
            seed=SEED + number,
            report=report,
            save=save,
        )
        finish(number + 2)
    team.leave()


if __name__ == "__main__":
    raise SystemExit(main())
