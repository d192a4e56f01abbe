"""The command line on the model that comes with the package: what a newcomer types first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PICTURES = Path(__file__).parent.parent.parent / "examples" / "pictures"
MUG = str(PICTURES / "norvik-mug-red.png")

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _no_model_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_MODEL")


def test_a_drawn_mug_is_analyzed_and_then_remembered(shell):
    first, second = (shell("analyze", MUG, "--json") for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    miss, hit = first.lines[0], second.lines[0]
    assert (miss["cache"], hit["cache"]) == ("miss", "hit")
    assert miss["analysis"] == hit["analysis"]
    assert miss["analysis"]["brand"] == "NORVIK"
    assert miss["analysis"]["category"] == "mug"
    assert miss["analysis"]["attributes"]["color"] == "red"
    assert 0 < miss["confidence"] <= 1
    assert set(miss["field_confidence"]) >= {"brand", "category", "attributes.color"}
    assert miss["usage"]["image_tokens"] > 0
    assert "not photographs" in first.err
    assert "--model" in first.err


@pytest.mark.parametrize(
    "arguments", [["Q", "--max-tokens", "10000000"], pytest.param(["why? " * 20_000], marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_the_limit(shell, arguments):
    ran = shell("ask", MUG, *arguments, "--json")
    assert ran.code == 1
    assert ran.lines[0]["error"]["code"] == "context_length_exceeded"
    assert "context" in ran.error


@pytest.mark.slow
def test_pictures_in_their_order(shell):
    shirt = str(PICTURES / "haxley-shirt-white.jpg")
    ran = shell("ask", MUG, shirt, "What color is it?", "-o", "colors.jsonl")
    assert ran.code == 0
    answers = [json.loads(line)["text"].lower() for line in Path("colors.jsonl").read_text().splitlines()]
    assert "red" in answers[0]
    assert "white" in answers[1]
