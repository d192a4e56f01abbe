"""`examples/boxes.py` locates on every picture, draws, and writes a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.test_own import load
from tests.scripted_endpoint import Echo, ScriptedEndpoint, ScriptedExchange, Text


class Locating(Echo):
    """Answers the questions of the probe by the echo, and those of the example with a box."""

    async def __call__(self, exchange: ScriptedExchange) -> None:
        located = "Locate every instance" in str(exchange.received.body)
        await (Text('[{"bbox_2d": [250, 125, 500, 375], "label": "the brand"}]') if located else Echo())(exchange)


def test_the_example_draws_and_writes_coco(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedEndpoint(models=["Qwen3-VL"], default=Locating()) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        load("boxes").main(tmp_path, "openai:Qwen3-VL")
    data = json.loads((tmp_path / "boxes.json").read_text(encoding="utf-8"))
    assert len(data["images"]) == len(data["annotations"]) == len(list(tmp_path.glob("*-boxes.png"))) > 1
    assert "the brand at (" in capsys.readouterr().out
