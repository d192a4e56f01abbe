"""Checkpoints that are whole, cut off, incomplete, pointers, or of another family."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from qvl.ascend.checks import weights

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.ascend.report import Finding


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two real shards, an index, a config and the files beside."""
    shards = {f"model-0000{number}-of-00002.safetensors": f"layer.{number}" for number in (1, 2)}
    for name, tensor in shards.items():
        save_file(
            {f"{tensor}.weight": np.ones((8, 4), np.float32), f"{tensor}.bias": np.zeros(4, np.float32)},
            tmp_path / name,
        )
    weight_map = {f"{tensor}.{part}": name for name, tensor in shards.items() for part in ("weight", "bias")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def bad(folder: Path) -> list[Finding]:
    return [finding for finding in weights.check(folder) if finding.status in ("warn", "fail")]


def test_a_whole_checkpoint_is_ok(checkpoint: Path) -> None:
    assert bad(checkpoint) == []


def test_a_single_file_checkpoint_is_ok(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "model-00001-of-00002.safetensors").rename(checkpoint / "model.safetensors")

    assert bad(checkpoint) == []


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-00002-of-00002.safetensors").unlink()

    assert [finding.summary for finding in bad(checkpoint)] == ["model-00002-of-00002.safetensors is missing"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda whole: whole[:-5], "cut off"),
        (lambda whole: whole + b"\0\0", "too long"),
        (lambda whole: whole[:20], "no safetensors header"),
        (lambda whole: whole[:3], "only 3 bytes"),
        (lambda whole: b"", "empty"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer"),
        (lambda whole: whole[:8] + b"x" * (len(whole) - 8), "cannot be read"),
    ],
)
def test_a_shard_that_is_not_what_its_header_says_is_named(checkpoint: Path, content: object, word: str) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.write_bytes(content(shard.read_bytes()))  # type: ignore[operator]

    found = bad(checkpoint)

    assert len(found) == 1
    assert "model-00001" in found[0].summary
    assert word in found[0].summary


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "{}", "[]", "not json"])
def test_another_family_or_a_broken_config_fails(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)

    assert any(finding.status == "fail" for finding in bad(checkpoint))


@pytest.mark.parametrize("text", ['{"weight_map": {}}', "{}", "[]", "nope"])
def test_a_broken_index_fails(checkpoint: Path, text: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(text)

    assert [finding.check for finding in bad(checkpoint)] == ["weights"]


def test_a_folder_that_is_none_or_empty_fails(tmp_path: Path) -> None:
    assert bad(tmp_path / "none")[0].status == "fail"
    assert bad(tmp_path)[0].status == "fail"


def test_missing_processor_files_and_half_downloads_warn(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    (checkpoint / "shard.incomplete").write_text("")

    assert [finding.status for finding in bad(checkpoint)] == ["warn", "warn"]


def test_quantised_weights_are_said_to_be_for_other_backends(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    (finding,) = bad(checkpoint)
    assert "quantised (mxfp4)" in finding.summary
    assert "vllm:" in str(finding.fix)
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert not bad(checkpoint)


def test_a_processor_saved_by_transformers_5_counts(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink()
    (checkpoint / "processor_config.json").write_text('{"image_processor": {}}')
    assert not bad(checkpoint)


def test_the_files_of_modelslim_are_found_and_named_for_what_they_are(checkpoint: Path) -> None:
    for path in sorted(checkpoint.glob("model*")):
        text = path.name.replace("model", "quant_model_weights", 1)
        path.rename(checkpoint / text)
    index = checkpoint / "quant_model_weights.safetensors.index.json"
    body = json.loads(index.read_text())
    renamed = {key: name.replace("model", "quant_model_weights", 1) for key, name in body["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": renamed}))
    (checkpoint / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8"}))

    (finding,) = bad(checkpoint)
    assert "quantised (W8A8), which the local backend cannot run" in finding.summary
    assert not [finding for finding in weights.check(checkpoint, engine="vllm") if finding.status != "ok"]

    (checkpoint / "quant_model_weights-00002-of-00002.safetensors").unlink()
    assert any("is missing" in finding.summary for finding in bad(checkpoint))
