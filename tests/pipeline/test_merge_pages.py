"""Answers to single pages become one answer, by the stated rules."""

from __future__ import annotations

from qvl.pipeline.merge_pages import PageAnswer, merge_pages


def test_what_a_page_does_not_tell_is_left_to_the_others() -> None:
    merged = merge_pages(
        [
            PageAnswer(1, {"total": None, "seller": "A", "lines": [], "note": ""}),
            PageAnswer(2, {"total": 0, "seller": None, "lines": None, "note": None, "paid": False}),
        ]
    )
    assert merged.data == {"total": 0, "seller": "A", "lines": [], "note": "", "paid": False}
    assert merged.pages == {"total": 2, "seller": 1, "paid": 2}
    assert merged.notes == []


def test_the_surest_value_holds_and_the_first_without_confidences() -> None:
    pages = [PageAnswer(n, {"total": n * 10}, {"total": sure}) for n, sure in ((1, 0.5), (4, 0.9), (7, 0.9))]
    merged = merge_pages(pages)
    assert (merged.data, merged.pages, merged.sure) == ({"total": 40}, {"total": 4}, {"total": 0.9})
    assert merged.notes == ["total: 40 of page 4 is taken; page 1: 10, page 7: 70"]
    bare = merge_pages([PageAnswer(page.page, page.data) for page in pages])
    assert (bare.data, bare.pages, bare.sure) == ({"total": 10}, {"total": 1}, {})


def test_lists_are_joined_with_the_page_and_confidence_of_each_item() -> None:
    first = PageAnswer(1, {"lines": [{"n": 1}, {"n": 1}], "units": ["kg", "kg"]}, {"lines.1.n": 0.7, "units.0": 0.8})
    second = PageAnswer(2, {"lines": [{"n": 1}], "units": ["kg", "l"]}, {"lines.0.n": 0.6, "units.1": 0.9})
    merged = merge_pages([first, second])
    assert merged.data == {"lines": [{"n": 1}, {"n": 1}, {"n": 1}], "units": ["kg", "kg", "l"]}
    assert merged.pages == {"lines.0": 1, "lines.1": 1, "lines.2": 2, "units.0": 1, "units.1": 1, "units.2": 2}
    assert merged.sure == {"lines.1.n": 0.7, "lines.2.n": 0.6, "units.0": 0.8, "units.2": 0.9}


def test_objects_are_merged_field_by_field() -> None:
    first = PageAnswer(1, {"seller": {"name": "A", "tax": None}}, {"seller.name": 0.9})
    second = PageAnswer(3, {"seller": {"name": "B", "tax": "7"}}, {"seller.name": 0.4, "seller.tax": 0.8})
    merged = merge_pages([first, second])
    assert merged.data == {"seller": {"name": "A", "tax": "7"}}
    assert merged.pages == {"seller.name": 1, "seller.tax": 3}
    assert merged.sure == {"seller.name": 0.9, "seller.tax": 0.8}
    assert merged.notes == ["seller.name: 'A' of page 1 is taken; page 3: 'B'"]


def test_values_of_two_kinds_are_one_choice() -> None:
    merged = merge_pages([PageAnswer(1, {"a": [1]}), PageAnswer(2, {"a": "x" * 100})])
    assert merged.data == {"a": [1]}
    assert merged.notes[0].endswith("…")
