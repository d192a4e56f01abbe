"""Lessons and evaluation of boxes: what is asked for is where the drawing says, in the library's own prompts."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from training.evaluate import SIZES, score_places
from training.evaluate_places import overlap, place_cases
from training.places import Shown

from qvl.evidence.prompts import locate_prompt
from qvl.tiny import FIRST_TRAINING_SEED
from qvl.tiny.render import BRANDS, DrawnProduct, draw_with_boxes
from training import lessons, places

BRAND = (0.1, 0.021, 0.9, 0.25)
LEFT, RIGHT = (0.1, 0.4, 0.4, 0.8), (0.6, 0.38, 0.9, 0.78)
MUGS = Shown(DrawnProduct("NORVIK", "mug", "red", 2), BRAND, (LEFT, RIGHT))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("the brand", [BRAND]),
        ("label", [BRAND]),
        ("the products", [LEFT, RIGHT]),
        ("mugs", [LEFT, RIGHT]),
        ("a red mug", [LEFT, RIGHT]),
        ("杯子", [LEFT, RIGHT]),
        ("the blue mug", []),
        ("the shoe", []),
        ("the cat", []),
    ],
)
def test_a_target_is_found_where_it_is(target: str, expected: list[places.Place]) -> None:
    assert places.found(target, MUGS) == expected
    assert places.found(target, Shown(None)) == []


def test_answers_are_lists_in_the_order_asked_and_in_tens_of_thousandths() -> None:
    prompt, answer = places.question(["the mug", "the cat", "brand"], MUGS)
    assert prompt == locate_prompt(["the mug", "the cat", "brand"])
    assert json.loads(answer) == [
        {"bbox_2d": [100, 400, 400, 800], "label": "the mug"},
        {"bbox_2d": [600, 380, 900, 780], "label": "the mug"},
        {"bbox_2d": [100, 20, 900, 250], "label": "brand"},
    ]
    prompt, answer = places.question(["the mug"], MUGS, points=True)
    assert prompt == locate_prompt(["the mug"], points=True)
    assert json.loads(answer)[1] == {"point_2d": [750, 580], "label": "the mug"}
    assert places.question(["the cat"], MUGS)[1] == "[]"


def test_evidence_has_a_box_for_every_field() -> None:
    answer = json.loads(places.evidence_answer(MUGS, "pt"))
    assert answer["category"] == "caneca"
    around = [100, 380, 900, 800]
    assert answer["evidence"] == {"brand": [100, 20, 900, 250], "category": around, "attributes": around}
    nothing = json.loads(places.evidence_answer(Shown(None), "en"))
    assert nothing["evidence"] == {"brand": None, "category": None, "attributes": None}


def test_lessons_vary_what_is_asked() -> None:
    dice = random.Random(2)
    turns = [turn for dialogue in lessons.locations([MUGS, Shown(None)], 300, dice) for turn in dialogue.turns]
    answers = [json.loads(turn.answer) for turn in turns]
    assert 0.3 < sum(answer == [] for answer in answers) / len(answers) < 0.8
    assert 0.05 < sum("point_2d" in turn.question for turn in turns) / len(turns) < 0.2
    assert len({turn.question for turn in turns}) > 150


@pytest.mark.parametrize("harder", [False, True])
def test_shifted_training_pictures_keep_their_boxes(tmp_path, harder: bool) -> None:
    from training.pictures import PictureStore

    store = PictureStore(tmp_path, 320, harder=harder)
    store.fill()
    taken = store.take(0, 60, np.random.default_rng(4))
    checked = 0
    for pixels, shown in zip(taken.pixels.astype(int), taken.shown(), strict=True):
        if shown.brand is None or harder:
            continue
        left, top, right, bottom = (round(side * 128) for side in shown.brand)
        inside = pixels[top + 1 : bottom - 1, left + 1 : right - 1]
        assert np.percentile(inside.max(-1), 75) > 236  # paper
        checked += 1
    assert checked > 30 or harder
    brands = {shown.product.brand for shown in taken.shown() if shown.product}
    assert harder == bool({brand for brand in brands if brand} - set(BRANDS))


def test_tokens_point_to_the_nearest_product() -> None:
    torch = pytest.importorskip("torch")
    from training.pointers import edges, targets

    wanted = torch.full((1, 5, 4), torch.nan)
    wanted[0, 0], wanted[0, 1], wanted[0, 2] = (torch.tensor(place) for place in (BRAND, LEFT, RIGHT))
    pointed = targets(wanted, (128, 128))
    assert pointed.shape == (1, 16, 8)
    for token, nearest in ((0, LEFT), (3, RIGHT), (12, LEFT), (14, RIGHT)):
        assert torch.allclose(pointed[0, token], torch.tensor([*BRAND, *nearest]))
    held = edges(wanted, (128, 128)).view(4, 4, 8)
    assert held[0, 0].tolist() == [12, 2, 32, 32, 32, 32, 32, 32]  # the plate's left and top, in pixels of the token
    assert held[1, 0].tolist() == [32, 32, 32, 0, 12, 19, 32, 32]
    assert held[3, 1].tolist() == [32, 32, 32, 32, 32, 32, 19, 6]
    nothing = torch.full((1, 5, 4), torch.nan)
    assert targets(nothing, (96, 160)).isnan().all()
    assert (edges(nothing, (96, 160)) == 32).all()


def test_overlap_is_intersection_over_union() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_answers_as_they_are_taught_score_full_marks_and_others_do_not() -> None:
    cases = place_cases(12, 40, SIZES)
    perfect = []
    for case in cases:
        boxes = {key: [places.thousandths(place) for place in drawn] for key, drawn in case.expected.items()}
        if case.kind == "evidence":
            evidence = {key: (found or [None])[0] for key, found in boxes.items()}
            perfect.append(json.dumps({**(case.fields or {}), "evidence": evidence}))
        else:
            perfect.append(
                json.dumps([{"bbox_2d": box, "label": key} for key, found in boxes.items() for box in found])
            )
    scores = score_places(cases, perfect)
    assert all(row.share == 1.0 for row in scores.values()), scores
    for bad in ("", "[", "[3]", '{"evidence": 3}', '[{"bbox_2d": [1, 2], "label": "the brand"}]', "null"):
        worst = score_places(cases, [bad] * len(cases))
        assert worst["boxes products"].right == worst["evidence brand"].right == 0
    shifted = score_places(cases, [answer.replace("0, ", "9, ") for answer in perfect])
    assert shifted["boxes products"].share > 0.9
    with pytest.raises(ValueError, match="held-out"):
        place_cases(10, FIRST_TRAINING_SEED, SIZES)


def test_a_drawing_shows_shares_of_its_sides() -> None:
    product = DrawnProduct("NORVIK", "hat", "green", 4)
    drawing = draw_with_boxes(product, 3, (640, 320))
    shown = places.show(product, drawing)
    assert drawing.brand_box is not None
    assert shown.brand is not None
    assert [round(side * length) for side, length in zip(shown.brand, (640, 320) * 2, strict=True)] == list(
        drawing.brand_box
    )
    assert len(shown.products) == 4
