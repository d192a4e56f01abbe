"""Which checkpoints open: as published, as saved again, whole, and of plain numbers; the rest is refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model import loader, model_folder
from qvl.backends.local.model.device import open_device
from qvl.errors import ConfigError
from tests.backends.local.requests import ask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(model_folder.bundled_folder(), tmp_path / "copy")


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def answer(folder: Path) -> tuple[str, dict[str, Any]]:
    async def run() -> tuple[str, dict[str, Any]]:
        backend = LocalBackend(str(folder), device="cpu", dtype="float32", kv_cache_bytes=16 << 20)
        await backend.open()
        try:
            return (await backend.generate(ask(3, "What brand is it?"))).text, backend.identity()
        finally:
            await backend.aclose()

    return asyncio.run(run())


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        loader.load(str(folder), open_device("cpu", "float32"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.__setitem__(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def saved_by_transformers_5(folder: Path) -> None:
    """One processor_config.json, one chat_template.jinja, `rope_parameters`, and the name of its own tokenizer."""
    image = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image, "processor_class": "X"}))
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config))
    change(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", backend="tokenizers")


def saved_by_transformers_4(folder: Path) -> None:
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)


def saved_here(folder: Path) -> None:
    """By the installed transformers: model in shards, tokenizer; the processor's settings stay."""
    device = open_device("cpu", "float32")
    checkpoint = loader.load(str(folder), device)
    (folder / "model.safetensors").unlink()
    checkpoint.model.save_pretrained(folder, max_shard_size="1MB")
    checkpoint.tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").unlink()
    assert (folder / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("save", [saved_by_transformers_4, saved_by_transformers_5, saved_here])
def test_a_checkpoint_answers_the_same_however_it_was_saved(copy: Path, save: Any) -> None:
    before, _ = answer(copy)
    save(copy)
    after, identity = answer(copy)
    assert after == before
    assert identity["quantisation"] is None
    peeked = LocalBackend(str(copy), device="cpu", dtype="float32").peek_identity()
    assert peeked == identity


def test_settings_inside_processor_config_come_before_an_older_file(copy: Path) -> None:
    image = json.loads((copy / "preprocessor_config.json").read_text())
    inner = {"image_processor": image | {"max_pixels": None, "size": {"shortest_edge": 4096, "longest_edge": 8192}}}
    (copy / "processor_config.json").write_text(json.dumps(inner))
    checkpoint = loader.load(str(copy), open_device("cpu", "float32"))
    assert checkpoint.image_config["size"]["longest_edge"] == 8192


def test_picture_settings_that_are_nowhere_are_named(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    told = refused(copy)
    assert "preprocessor_config.json" in told
    assert "processor_config.json" in told


@pytest.mark.parametrize("wrong", [{"patch_size": "big"}, {"size": [1, 2]}, {"image_mean": [0.5]}, {"merge_size": 0}])
def test_picture_settings_that_make_no_sense_are_one_line(copy: Path, wrong: dict[str, Any]) -> None:
    change(copy / "preprocessor_config.json", **wrong)
    with pytest.raises(ConfigError, match="image processor settings"):
        answer(copy)


def test_weights_that_are_missing_are_named(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    up, qkv = "model.language_model.layers.1.mlp.up_proj.weight", "model.visual.blocks.0.attn.qkv.bias"
    edit(copy, **{up: None, qkv: None})
    told = refused(copy)
    assert up in told
    assert qkv in told
    assert "2 weights are missing" in told
    assert capfd.readouterr() == ("", ""), "transformers' own report is no part of one line"


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    name = "model.language_model.layers.0.self_attn.q_norm.weight"
    edit(copy, **{name: torch.ones(3)})
    told = refused(copy)
    assert name in told
    assert "another shape" in told


def test_a_head_that_is_the_embedding_needs_no_weights_of_its_own(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    tensors = load_file(copy / "model.safetensors")
    head = {"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()}
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (copy / "config.json").write_text(json.dumps(config))
    if "lm_head.weight" in tensors:
        edit(copy, **{"lm_head.weight": None})
    tied, _ = answer(copy)
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" in refused(copy)
    edit(copy, **head)
    assert answer(copy)[0] == tied


@pytest.mark.parametrize(
    ("part", "field", "named"),
    [
        ("text_config", "num_hidden_layers", "language_model.layers."),
        ("vision_config", "depth", "visual.blocks."),
        ("vision_config", "deepstack_visual_indexes", "visual.deepstack_merger_list."),
    ],
)
def test_a_config_that_names_fewer_layers_than_the_files_hold_is_refused(
    copy: Path, capfd: pytest.CaptureFixture[str], part: str, field: str, named: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    value = config[part][field]
    config[part][field] = value[:-1] if isinstance(value, list) else value - 1
    if field == "depth":
        config[part]["deepstack_visual_indexes"] = [
            min(at, value - 2) for at in config[part]["deepstack_visual_indexes"]
        ]
    (copy / "config.json").write_text(json.dumps(config))
    told = refused(copy)
    assert "does not name" in told
    assert named in told
    assert capfd.readouterr() == ("", "")


def test_counts_among_the_weights_are_no_weights(copy: Path) -> None:
    before, _ = answer(copy)
    edit(copy, **{"model.visual.position_ids": torch.arange(8)})
    assert answer(copy)[0] == before


def test_weights_in_a_pickle_are_refused_with_the_way_to_save_them(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    assert loader.peek(str(copy)) is not None
    (copy / "model.safetensors").unlink()
    told = refused(copy)
    assert "pytorch_model.bin" in told
    assert "save_pretrained" in told
    assert loader.peek(str(copy)) is None


def test_a_shard_that_the_index_names_must_be_there(copy: Path) -> None:
    saved_here(copy)
    sorted(copy.glob("model-0*.safetensors"))[-1].unlink()
    assert "cannot be loaded" in refused(copy)


QUANTISED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
    ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
    ({"quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({}, None),
]


@pytest.mark.parametrize(("settings", "words"), QUANTISED)
@pytest.mark.parametrize("inner", [None, "text_config", "vision_config"])
def test_a_quantised_checkpoint_is_refused_at_load(
    copy: Path, settings: dict[str, Any], words: str | None, inner: str | None
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (config[inner] if inner else config)["quantization_config"] = settings
    (copy / "config.json").write_text(json.dumps(config))
    peeked = LocalBackend(str(copy), device="cpu", dtype="float32").peek_identity()
    if words is None:
        assert peeked is not None
        return
    told = refused(copy)
    assert words in told
    assert "vllm:" in told
    assert peeked is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", torch.ones(8, 8).to(torch.float8_e4m3fn)),
        ("model.language_model.layers.0.mlp.up_proj.weight", torch.ones(8, 8, dtype=torch.int8)),
        ("model.language_model.layers.0.self_attn.q_norm.weight", torch.ones(1, dtype=torch.int32)),
        ("model.language_model.layers.0.self_attn.q_norm.weight", torch.ones(1, dtype=torch.bool)),
        ("model.language_model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1)),
        ("model.language_model.layers.0.mlp.up_proj.qweight", torch.ones(8, 8, dtype=torch.int32)),
    ],
)
def test_quantised_weights_are_refused_where_config_json_does_not_say_so(
    copy: Path, name: str, tensor: torch.Tensor
) -> None:
    edit(copy, **{name: tensor})
    told = refused(copy)
    assert "quantised" in told
    assert name in told
