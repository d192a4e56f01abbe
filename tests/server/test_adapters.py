"""`qvl-serve --lora NAME=PATH`: clients choose adapters by the model's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from qvl.cli.serve_settings import ServeSettings, read_adapters
from qvl.errors import ConfigError
from tests.backends.lora_files import random_adapter
from tests.server.conftest import question
from tests.server.processes import Process


@pytest.mark.slow
def test_adapters_are_models_beside_their_own(tmp_path: Path, run: Callable[..., Process]) -> None:
    folders = {name: random_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("shelf", "bill"))}
    named = [f"--lora={name}={folder}" for name, folder in folders.items()]
    on_cpu = ("--device", "cpu", "--dtype", "float32", "--cache", "memory:")
    server = run(*named, "--served-model-name", "tiny", *on_cpu).wait_ready()
    listed = {model["id"]: model["parent"] for model in server.get("/v1/models").json()["data"]}
    assert listed == {"tiny": None, "shelf": "tiny", "bill": "tiny"}
    assert server.get("/v1/models/bill").json()["root"] == "bundled"
    answers: dict[str, str] = {}
    prints = set()
    for state in ("miss", "hit"):
        for name in listed:
            answer = server.post(question("What brand is it?") | {"model": name, "max_tokens": 16})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-qvl-cache"] == state
            told = answer.json()
            assert told["model"] == name
            prints.add(told["system_fingerprint"])
            text = told["choices"][0]["message"]["content"]
            assert answers.setdefault(name, text) == text
    assert len(prints) == 3
    assert len(set(answers.values())) > 1
    refused = server.post(question("What brand is it?") | {"model": "other"})
    assert refused.status_code == 404
    assert "available: tiny, shelf, bill" in refused.json()["error"]["message"]


@pytest.mark.parametrize("text", ["", "shelf", "=folder", "shelf=", " = "])
def test_an_adapter_without_a_name_or_a_path(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapters([text])


def test_adapters_named_twice_or_for_another_backend() -> None:
    with pytest.raises(ConfigError, match="names 'shelf' twice"):
        read_adapters(["shelf=a", "shelf=b"])
    with pytest.raises(ConfigError, match="exclude each other"):
        ServeSettings(lora=["shelf=a"], option=["adapter=b"]).backend_options()
    with pytest.raises(ConfigError, match="an endpoint's adapters are models of it: openai:NAME"):
        ServeSettings(model="openai:m", lora=["shelf=a"]).backend_options()
