"""The rows that adapters change travel with a step's other integers, and are part of the shape that is recorded."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qvl.backends.local.model.step_inputs import StepInputs, send  # noqa: E402 - skipped without torch


def sent(adapters: list[int], kept: list[int] | None = None) -> StepInputs:
    positions = [np.zeros((3, 5), dtype=np.int64)]
    return send(range(5), positions, [], 2, torch.device("cpu"), kept=kept, adapters=adapters)


def rows(parts: object) -> dict[int, list[int] | None]:
    return {number: None if at is None else at.tolist() for number, at in parts}  # type: ignore[attr-defined]


def test_each_adapter_has_its_rows_and_one_of_all_needs_none() -> None:
    inputs = sent([0, 2, 1, 2, 2], kept=[1, 4])
    assert rows(inputs.adapted.all) == {1: [2], 2: [1, 3, 4]}
    assert rows(inputs.adapted.kept) == {2: None}
    assert rows(inputs.clone().adapted.all) == {1: [2], 2: [1, 3, 4]}
    assert rows(sent([3] * 5).adapted.all) == rows(sent([3] * 5).adapted.kept) == {3: None}
    assert rows(sent([]).adapted.all) == {}


def test_steps_of_other_adapters_have_another_shape() -> None:
    shapes = {sent(adapters).shape for adapters in ([], [1] * 5, [2] * 5, [1, 1, 0, 0, 0], [0, 0, 0, 1, 1])}
    # The last two differ in their rows alone, which a recording is given anew.
    assert len(shapes) == 4
