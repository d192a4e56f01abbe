"""Qwen2.5-VL: answers equal transformers', its boxes are pixels, and videos are shown as pictures."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qvl import Pipeline
from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_size import size_of
from qvl.errors import ConfigError
from tests.backends.local.checkpoints import random_windowed
from tests.backends.local.reference import Reference, clear
from tests.backends.local.requests import ask, mixed, picture
from tests.backends.local.test_equals_generate import Answered, answer_all, check

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backends.local.conftest import Opener


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_windowed(tmp_path_factory.mktemp("random-qwen2-5-vl"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def answered(reference: Reference) -> Answered:
    return clear(mixed(16, random.Random(11)), reference.generate)


SETTINGS: list[Any] = [
    pytest.param({"speculate": "on"}, id="default"),
    pytest.param({"prefix_cache": False, "vision_cache_bytes": 0}, id="no-caches", marks=pytest.mark.slow),
    pytest.param({"batch_invariant": True}, id="batch-invariant", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_mixed_requests_equal_generate(
    opened: Opener, folder: Path, reference: Reference, answered: Answered, settings: dict[str, Any]
) -> None:
    wanted, expected = answered
    backend = opened(folder, max_num_seqs=12, max_num_batched_tokens=160, **settings)
    check(reference, answer_all(backend, wanted), expected)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_300_mixed_requests_equal_generate(opened: Opener, folder: Path, reference: Reference) -> None:
    wanted, expected = clear(mixed(300, random.Random(12)), reference.generate)
    backend = opened(folder, max_num_seqs=24, max_num_batched_tokens=160)
    check(reference, answer_all(backend, wanted), expected)


@pytest.mark.parametrize("sizes", [((224, 56),), ((56, 56), (140, 196), (84, 224))], ids=["one", "several"])
def test_features_are_those_of_transformers_in_any_pieces(
    opened: Opener, folder: Path, reference: Reference, sizes: tuple[tuple[int, int], ...]
) -> None:
    from qvl.media.gate import load

    backend = opened(folder)
    assert backend._loaded is not None
    shown = [load(picture(seed).rgb().resize(size)) for seed, size in enumerate(sizes)]
    request = ask(*shown, "?")
    inputs = reference.inputs(request)
    visual = reference.model.model.visual
    with torch.inference_mode():
        expected = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        expected = getattr(expected, "pooler_output", expected)
        tower = backend._loaded.engine.runner.tower
        for largest in (float("inf"), 40_000.0):
            prepared = list(backend._loaded.processor.prepare(request).pictures)
            encoding = tower.pieces(prepared, largest)
            while True:
                try:
                    next(encoding)
                except StopIteration as end:
                    features = torch.cat([part[0] for part in end.value])
                    break
            assert torch.allclose(features, expected, atol=1e-5)


def test_the_cost_of_a_picture_is_the_work_that_its_windows_take(opened: Opener, folder: Path) -> None:
    from qvl.media.gate import load

    loaded = opened(folder)._loaded
    assert loaded is not None
    tower = loaded.engine.runner.tower
    for size in ((224, 56), (196, 140)):
        prepared = list(loaded.processor.prepare(ask(load(picture(0).rgb().resize(size)), "?")).pictures)
        assert tower.cost(prepared[0]) == pytest.approx(sum(tower.pieces(prepared)), rel=1e-6)


def test_its_boxes_are_pixels_of_the_picture_as_it_resizes_it(folder: Path) -> None:
    backend = LocalBackend(str(folder), device="cpu", dtype="float32")
    assert backend.peek_identity() is not None
    where = backend.coordinates
    assert (where.convention, where.factor, where.min_pixels, where.max_pixels) == ("pixels", 28, 56 * 56, 224 * 224)


def test_a_video_is_shown_as_pictures_with_a_note(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the films of the tests are made with it")
    from tests.media.films import film

    clip = film(tmp_path / "clip.mp4")
    assert LocalBackend().capabilities.videos
    backend = LocalBackend(str(folder), device="cpu", dtype="float32", kv_cache_bytes=32 << 20)
    with Pipeline(backend=backend, cache=None) as pipe:
        result = pipe.ask(clip, "When?", max_tokens=4)
    assert "sent as 4 pictures, each behind its time" in result.notes[0]
    assert (result.usage.video_frames, result.usage.video_tokens or 0) == (4, 0)


def test_attention_in_sliding_windows_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    config["text_config"]["layer_types"] = ["sliding_attention"] * 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="sliding window"):
        asyncio.run(LocalBackend(str(copy), device="cpu", dtype="float32").open())


def published(config: dict[str, Any]) -> dict[str, Any]:
    """The same config.json as it is published: the text's settings beside `vision_config`."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters", None) or {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision = config.pop("vision_config")
    vision = {name: value for name, value in vision.items() if name not in ("in_channels", "rope_parameters")}
    return {**text, **older, **config, "vision_config": {**vision, "in_chans": 3}}


def test_the_published_form_of_its_settings_is_the_same_model(
    opened: Opener, folder: Path, tmp_path: Path, reference: Reference, answered: Answered
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    size = size_of(config, "m")
    older = published(config)
    (copy / "config.json").write_text(json.dumps(older))
    assert size_of(older, "m") == size
    parameters = sum(weight.numel() for weight in reference.model.parameters())
    assert size.layers + 2 * size.embedding + size.tower == pytest.approx(parameters, rel=0.02)
    wanted, expected = answered
    check(reference, answer_all(opened(copy), wanted[:4]), expected[:4])
