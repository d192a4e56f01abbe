"""Training runs from nothing to a checkpoint that loads and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from training.train import COURSES, TrainingPlan, run

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
    for number in range(3, len(COURSES) + 1):
        plan.stage(number).unlink()
    second = plan.stage(2).stat().st_mtime_ns
    capfd.readouterr()
    run(plan)
    told = capfd.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("stage")] == [f"stage {number} of 6" for number in (3, 4, 5, 6)]
    assert plan.stage(2).stat().st_mtime_ns == second
    assert plan.stage(6).is_file()


@pytest.mark.slow
def test_a_run_that_was_killed_within_a_stage_goes_on_at_its_last_saved_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    plan = TrainingPlan(tmp_path, pictures=64, vision_steps=2, steps=2, start=WEIGHTS)
    run(plan)
    state = torch.load(plan.stage(6), weights_only=True)
    plan.stage(6).unlink()
    torch.save(state | {"step": 1}, plan.stage(6, part=True))
    capfd.readouterr()
    run(plan)
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("stage")] == [
        "stage 6 of 6, from 1"
    ]
    assert not plan.stage(6, part=True).exists()


@pytest.mark.slow
def test_only_the_stages_that_teach_boxes_follow_a_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(TrainingPlan(tmp_path, pictures=64, vision_steps=2, steps=2, start=WEIGHTS))
    told = capfd.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("stage")] == ["stage 5 of 6", "stage 6 of 6"]
    assert not (tmp_path / "pictures" / "done").read_bytes().strip(b"\0")
