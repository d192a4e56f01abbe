"""Random weights, converted by optimum-intel as the README tells a user to, and asked through the backend."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl import media
from qvl.backends.base import Backend
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.errors import ConfigError
from qvl.testing.asking import ask
from qvl.tiny import render
from tests.backends.openvino.conftest import EXACT, Export


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the bundled model's shape and tokenizer whose weights are random."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from qvl.backends.local.model.model_folder import bundled_folder

    folder = tmp_path_factory.mktemp("random")
    for path in bundled_folder().iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    torch.manual_seed(7)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads((folder / "config.json").read_text())))
    state = {
        name: tensor.contiguous() for name, tensor in model.half().state_dict().items() if name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def answer(backend: Backend) -> list[Any]:
    """The tokens of two answers, of which one has seen a picture."""
    picture = media.load(render.sample(7000)[1])
    more: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "logprobs": 0}
    requests = [ask("Describe the product.", picture, **more), ask("Describe the product.", **more)]
    async with backend:
        results = await asyncio.gather(*map(backend.generate, requests))
    return [[note.token for note in result.logprobs or ()] for result in results]


@pytest.fixture(scope="module")
def converted(random_weights: Path, export: Export) -> Callable[[str], Path]:
    """The random weights in OpenVINO's form, each format made once."""
    return functools.cache(lambda weight_format: export(random_weights, weight_format))


def test_converted_weights_answer_token_for_token_as_the_checkpoint(
    random_weights: Path, converted: Callable[[str], Path]
) -> None:
    ours = asyncio.run(answer(LocalBackend(str(random_weights), dtype="float32", device="cpu")))
    assert [len(tokens) for tokens in ours] == [24, 24]
    assert asyncio.run(answer(OpenVinoBackend(str(converted("fp16")), **EXACT))) == ours


@pytest.mark.parametrize(("weight_format", "share"), [("int8", 0.7), ("int4", 0.5)])
def test_weights_are_packed_and_say_so(converted: Callable[[str], Path], weight_format: str, share: float) -> None:
    folders = [converted("fp16"), converted(weight_format)]
    plain, packed = ((folder / "openvino_language_model.bin").stat().st_size for folder in folders)
    assert packed < share * plain
    assert [len(tokens) for tokens in asyncio.run(answer(OpenVinoBackend(str(folders[1]))))] == [24, 24]
    first, second = (OpenVinoBackend(str(folder)).peek_identity() for folder in folders)
    assert first is not None
    assert second is not None
    assert (first["quantisation"], second["quantisation"]) == (None, weight_format)
    assert first["weights"] != second["weights"]


def test_a_checkpoint_that_was_not_converted_is_refused_with_the_command(random_weights: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(OpenVinoBackend(str(random_weights)).open())
    assert f"optimum-cli export openvino --model {random_weights} --task image-text-to-text" in str(caught.value)
    assert "\n" not in str(caught.value)
