"""Quantised checkpoints answer as the plain numbers they stand for, and are refused where they are not whole."""

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
from qvl.backends.local.model.checkpoint_files import read_json
from qvl.backends.local.model.device import open_device
from qvl.backends.local.model.unpack_weights import unpacked_weights
from qvl.backends.local.model.weight_form import readable, weight_form
from qvl.errors import ConfigError
from tests.backends.local import quantise
from tests.backends.local.checkpoints import random_mixture
from tests.backends.local.reference import Reference
from tests.backends.local.requests import ask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FORMS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "awq": (quantise.awq, AWQ, "awq, 4 bit"),
    "gptq": (quantise.gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq, 4 bit"),
    "gptq, columns out of order": (
        quantise.gptq(8, shuffled=True),
        {"quant_method": "gptq", "bits": 8, "desc_act": True},
        "gptq, 8 bit",
    ),
    "gptq_v2": (
        quantise.gptq(2, less_one=False),
        {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
        "gptq, 2 bit",
    ),
    "pack-quantized, groups": (
        quantise.pack_quantized(4, 32, symmetric=True),
        quantise.compressed("pack-quantized", num_bits=4, group_size=32),
        "compressed-tensors, pack-quantized",
    ),
    "pack-quantized, zero points": (
        quantise.pack_quantized(4, 32, symmetric=False),
        quantise.compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False),
        "compressed-tensors, pack-quantized",
    ),
    "pack-quantized, rows": (
        quantise.pack_quantized(8, None, symmetric=True),
        quantise.compressed("pack-quantized", num_bits=8),
        "compressed-tensors, pack-quantized",
    ),
    "int-quantized": (
        quantise.int_quantized,
        quantise.compressed("int-quantized", num_bits=8),
        "compressed-tensors, int-quantized",
    ),
    "float-quantized": (
        quantise.float_quantized,
        quantise.compressed("float-quantized", num_bits=8, type="float"),
        "compressed-tensors, float-quantized",
    ),
    "naive-quantized": (
        quantise.int_quantized,
        quantise.compressed("naive-quantized", num_bits=8),
        "compressed-tensors, naive-quantized",
    ),
    "fp8": (quantise.fp8_blocks(128, 128), FP8, "fp8"),
    "fp8, blocks cut short": (quantise.fp8_blocks(96, 80), FP8 | {"weight_block_size": [96, 80]}, "fp8"),
}


def pair(tmp_path: Path, form: str) -> tuple[Path, Path]:
    """The bundled model in a form, and as the plain numbers that the form stands for."""
    plain = shutil.copytree(model_folder.bundled_folder(), tmp_path / "plain")
    pack, settings, _ = FORMS[form]
    return quantise.write_pair(plain, tmp_path / "quantised", pack, settings), plain


def unpacked(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    form = weight_form(folder, read_json(folder / "config.json", "it"), "it")
    assert form is not None
    return unpacked_weights(folder, form, "it", dtype, model_layout=True)


async def opened(folder: Path) -> tuple[str, dict[str, Any], str]:
    """The answer to a picture, the identity, and the line about the device."""
    backend = LocalBackend(str(folder), device="cpu", dtype="float32", kv_cache_bytes=16 << 20)
    peeked = backend.peek_identity()
    await backend.open()
    try:
        text = (await backend.generate(ask(3, "What brand is it?"))).text
        assert backend.identity() == peeked
        return text, backend.identity(), backend.describe()
    finally:
        await backend.aclose()


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_numbers_that_the_form_stands_for(tmp_path: Path, form: str) -> None:
    folder, plain = pair(tmp_path, form)
    expected = load_file(plain / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        weights = unpacked(folder, dtype)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name].to(dtype)), name


@pytest.mark.parametrize("form", ["awq", "gptq, columns out of order", "pack-quantized, zero points", "fp8"])
def test_answers_are_those_of_transformers_on_the_plain_numbers(tmp_path: Path, form: str) -> None:
    folder, plain = pair(tmp_path, form)
    reference = Reference(plain)
    tokens = reference.generate(ask(3, "What brand is it?"))
    text, identity, line = asyncio.run(opened(folder))
    assert text == reference.tokenizer.decode(tokens, skip_special_tokens=True)
    assert identity["quantisation"] == FORMS[form][2]
    assert line.startswith(f"cpu, float32; weights unpacked from {FORMS[form][2]} to float32")


def test_no_weight_is_in_memory_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = pair(tmp_path, "awq")
    places: set[int] = set()

    def noted(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        weights = unpacked_weights(*args, **kwargs)
        places.update(weight.data_ptr() for weight in weights.values())
        return weights

    monkeypatch.setattr(loader, "unpacked_weights", noted)
    checkpoint = loader.load(str(folder), open_device("cpu", "bfloat16"))
    assert {weight.data_ptr() for weight in checkpoint.model.parameters()} <= places
    assert checkpoint.eos_token_ids == loader.load(None, open_device("cpu", "bfloat16")).eos_token_ids


@pytest.mark.parametrize("apart", [True, False], ids=["one by one", "together"])
def test_experts_are_read_one_by_one_and_together(tmp_path: Path, apart: bool) -> None:
    plain = random_mixture(tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    stored = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stored[name] = tensor
            continue
        pack = quantise.fp8_blocks(32, 32)
        if not apart:
            layers = [pack(tensor[expert]) for expert in range(len(tensor))]
            stored[name] = torch.stack([layer["weight"].view(torch.uint8) for layer, _ in layers])
            stored[name] = stored[name].view(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.stack([layer["weight_scale_inv"] for layer, _ in layers])
            tensors[name] = torch.stack([read for _, read in layers])
            continue
        matrices = []
        for expert, both in enumerate(tensor):
            reads = []
            kinds = ("gate", "up") if "gate_up" in name else ("down",)
            for kind, matrix in zip(kinds, both.T.chunk(len(kinds)), strict=True):
                layer, read = pack(matrix.contiguous())
                stem = f"{name.rpartition('.')[0]}.{expert}.{kind}_proj."
                stored |= {stem + end: value for end, value in layer.items()}
                reads.append(read)
            matrices.append(torch.cat(reads).T)
        tensors[name] = torch.stack(matrices).contiguous()
    folder = shutil.copytree(plain, tmp_path / "quantised")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8 | {"weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    device = open_device("cpu", "float32")
    read, expected = (loader.load(str(place), device).model.state_dict() for place in (folder, plain))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    if apart:
        name = next(name for name in stored if ".experts.1.up_proj.weight" in name)
        save_file({key: stored[key] for key in stored if not key.startswith(name)}, folder / "model.safetensors")
        with pytest.raises(ConfigError, match=r"lacks weights of some of its \d experts"):
            loader.load(str(folder), device)


LAYER = "model.language_model.layers.1.mlp.up_proj"
FAULTS = [
    ("awq", {f"{LAYER}.scales": None}, f"{LAYER}.scales is missing"),
    ("awq", {f"{LAYER}.qweight": None}, f"{LAYER}.qzeros stands beside no weight"),
    ("awq", {f"{LAYER}.scales": torch.ones(3, 256)}, "zero points for scales of [3, 256]"),
    ("awq", {f"{LAYER}.qweight": torch.ones(96, 32, dtype=torch.int32)}, "1 weights have another shape"),
    (
        "awq",
        {f"{LAYER}.qweight": torch.ones(128, 8, dtype=torch.int32)},
        "scales of [256, 4] for a weight of [64, 128]",
    ),
    ("gptq", {f"{LAYER}.g_idx": torch.full((128,), 4, dtype=torch.int32)}, "names groups of columns that its 4 groups"),
    ("gptq", {f"{LAYER}.qweight": torch.ones(16, 256, dtype=torch.int8)}, "qweight is int8, which"),
    ("pack-quantized, groups", {f"{LAYER}.weight_shape": None}, f"{LAYER}.weight_shape is missing"),
    ("pack-quantized, groups", {f"{LAYER}.weight_shape": torch.tensor([256, 96])}, "holds no weight of [256, 96]"),
    ("pack-quantized, groups", {f"{LAYER}.weight_scale": torch.ones(256, 3)}, "scales of [256, 3]"),
    ("int-quantized", {f"{LAYER}.weight": torch.ones(256, 128)}, "stands beside no weight"),
    ("int-quantized", {f"{LAYER}.weight_scale": torch.ones(7)}, "scales of [7] for a weight of [256, 128]"),
    ("fp8", {f"{LAYER}.weight_scale_inv": None}, f"{LAYER}.weight_scale_inv or {LAYER}.weight_scale is missing"),
    ("fp8", {f"{LAYER}.weight_scale_inv": torch.ones(2, 2)}, "scales of [2, 2] for blocks of 128 x 128 in [256, 128]"),
    ("fp8", {f"{LAYER}.weight": torch.ones(256, 128, dtype=torch.int8)}, "is int8, which fp8 does not have"),
]


@pytest.mark.parametrize(("form", "changes", "words"), FAULTS)
def test_a_checkpoint_that_is_not_whole_is_one_line(
    tmp_path: Path, form: str, changes: dict[str, torch.Tensor | None], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = pair(tmp_path, form)
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        loader.load(str(folder), open_device("cpu", "float32"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_scales_of_activations_and_of_the_kv_cache_are_passed_over(tmp_path: Path) -> None:
    folder, plain = pair(tmp_path, "float-quantized")
    more = {f"{LAYER}.input_scale": torch.ones(1), "model.language_model.layers.1.self_attn.k_scale": torch.ones(1)}
    save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors")
    assert unpacked(folder).keys() == load_file(plain / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["pack-quantized", "int-quantized", "float-quantized"])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor", "block"])
def test_the_package_that_writes_compressed_tensors_reads_the_same(tmp_path: Path, name: str, strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    floats = name == "float-quantized"
    if (strategy == "block" and not floats) or (strategy == "group" and name != "pack-quantized"):
        pytest.skip("no such scheme")
    bits = 4 if name == "pack-quantized" else 8
    settings: dict[str, Any] = {"num_bits": bits, "strategy": strategy, "type": "float" if floats else "int"}
    settings["symmetric"] = floats or strategy == "tensor"
    settings |= {"group_size": 32} if strategy == "group" else {}
    settings |= {"block_structure": [32, 64]} if strategy == "block" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=settings, format=name)
    weight = torch.randn(96, 128)
    parts = {
        "group": weight.view(96, 4, 32),
        "channel": weight.view(96, 1, 128),
        "tensor": weight.view(1, 1, -1),
        "block": weight.view(3, 32, 2, 64).transpose(1, 2).reshape(3, 2, -1),
    }[strategy]
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
    if strategy == "tensor":
        scale, zero = scale.view(1), zero.view(1)
    state = {"weight": weight, "weight_scale": scale}
    if not settings["symmetric"]:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    save_file({f"layer.{end}": tensor.contiguous() for end, tensor in stored.items()}, tmp_path / "model.safetensors")
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": name,
            "config_groups": {"a": scheme.model_dump(mode="json")},
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.allclose(unpacked(tmp_path)["layer.weight"], expected.float(), rtol=1e-6, atol=0)


@pytest.mark.vllm
def test_words_are_packed_as_vllm_packs_them() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, pack_cols

    codes = torch.randint(0, 16, (64, 96), dtype=torch.int32)
    rows, columns = codes.numpy(), codes.T.numpy()
    assert torch.equal(awq_pack(codes.clone(), 4, 64, 96).int(), quantise.words(rows, 4, quantise.AWQ_ORDER))
    assert torch.equal(gptq_pack(codes.clone(), 4, 64, 96).int(), quantise.words(columns, 4).T)
    assert torch.equal(pack_cols(codes.clone(), 4, 64, 96).int(), quantise.words(rows, 4))


REFUSED = [
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "not 4 bit in 'gemv'"),
    ({"quant_method": "gptq", "bits": 3}, "not 3 bit"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
    (quantise.compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "nvfp4-pack-quantized with 4 bit"),
    (quantise.compressed("pack-quantized", num_bits=3), "3 bit"),
    (quantise.compressed("pack-quantized", num_bits=4) | {"transform_config": {"a": 1}}, "transformed"),
    (quantise.compressed("marlin-24", num_bits=4), "marlin-24"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_a_layout_that_is_not_read_is_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    config = {"model_type": "qwen3_vl", "quantization_config": settings}
    with pytest.raises(ConfigError) as caught:
        weight_form(tmp_path, config, "it")
    assert words in str(caught.value)
    assert "vllm:" in str(caught.value)
    assert not readable(tmp_path, config)
