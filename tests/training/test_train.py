"""Training runs from nothing to a checkpoint that loads and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from training.train import TrainingPlan, run

from qvl.tiny import WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_short_run_writes_a_checkpoint_that_answers(tmp_path: Path, workers: int) -> None:
    from training.reader import Reader, Request, user

    from qvl.tiny.render import DrawnProduct, draw

    run(TrainingPlan(tmp_path, pictures=640, vision_steps=2, steps=2, workers=workers))
    written = tmp_path / "weights"
    assert {path.name for path in written.iterdir()} == {path.name for path in WEIGHTS.iterdir()}
    assert (written / "tokenizer.json").read_bytes() == (WEIGHTS / "tokenizer.json").read_bytes()
    request = Request([user("What brand is it?")], (draw(DrawnProduct("NORVIK", "mug", "red"), 1),))
    assert len(Reader(written).answer([request], max_new_tokens=4)) == 1


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_after_its_last_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = TrainingPlan(tmp_path, pictures=64, vision_steps=2, steps=3)
    run(plan)
    assert plan.done() == 4
    for number in (3, 4):
        plan.stage(number).unlink()
    second = plan.stage(2).stat().st_mtime_ns
    capfd.readouterr()
    run(plan)
    told = capfd.readouterr().out
    assert "going on after stage 2 of 4" in told
    assert "course 1" not in told
    assert plan.done() == 4
    assert plan.stage(2).stat().st_mtime_ns == second
    assert TrainingPlan(tmp_path, pictures=65, vision_steps=2, steps=3).done() == 0
