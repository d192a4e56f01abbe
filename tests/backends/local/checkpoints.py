"""Random-weight Qwen3-VL checkpoints of real shape in the small: deepstack, mrope, grouped heads, an untied head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qvl.backends.local.model.model_folder import bundled_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json")


def random_checkpoint(folder: Path, *, seed: int = 0, layers: int = 3, hidden: int = 96, side: int = 256) -> Path:
    """Writes config, weights, tokenizer and processor settings; returns `folder`. Pictures have `side`² pixels at most.

    Weights are scaled so that activations stay of order one and the best token is rarely a near-tie.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    bundled = bundled_folder()
    config = json.loads((bundled / "config.json").read_text())
    config["tie_word_embeddings"] = False
    config["text_config"].update(
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        dtype="float32",
        rope_scaling={"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    )
    config["vision_config"].update(
        hidden_size=64,
        intermediate_size=128,
        depth=4,
        num_heads=4,
        out_hidden_size=hidden,
        deepstack_visual_indexes=[0, 2],
        num_position_embeddings=144,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**json.loads(json.dumps(config)))).float()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim >= 2:
            fan_in = 1 if "embed" in name and "patch" not in name else tensor[0].numel()
            tensor = torch.randn_like(tensor) * fan_in**-0.5
        elif name.endswith("bias"):
            tensor = torch.randn_like(tensor) * 0.1
        tensors[name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    image = json.loads((bundled / "preprocessor_config.json").read_text())
    image = {key: value for key, value in image.items() if key not in ("min_pixels", "max_pixels")}
    image["size"] = {"shortest_edge": 64 * 64, "longest_edge": side * side}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    video = json.loads((bundled / "video_preprocessor_config.json").read_text())
    video = {key: value for key, value in video.items() if key not in ("min_pixels", "max_pixels")}
    video["size"] = {"shortest_edge": 4096, "longest_edge": 6 * 96 * 128}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        shutil.copy(bundled / name, folder / name)
    return folder


def random_mixture(folder: Path, *, seed: int = 0) -> Path:
    """The same as a Qwen3-VL-MoE: one dense layer, then three of four experts, of which two answer each token."""
    import torch
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    dense = random_checkpoint(folder, seed=seed, layers=4)
    config = json.loads((dense / "config.json").read_text())
    config["model_type"] = "qwen3_vl_moe"
    config["text_config"].update(
        model_type="qwen3_vl_moe_text",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
    )
    config["vision_config"]["model_type"] = "qwen3_vl_moe"
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config)).float()
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2:
            fan_in = 1 if "embed" in name and "patch" not in name else tensor[0].numel() if tensor.ndim != 3 else 96
            tensor.data = torch.randn_like(tensor) * fan_in**-0.5
    model.save_pretrained(dense)
    return dense


def random_hybrid(
    folder: Path, *, seed: int = 0, mixture: bool = False, state_dims: tuple[int, int] = (16, 24)
) -> Path:
    """A Qwen3.5 in the small: three layers of four with a state, gates, partial rotation; dense or of four experts.

    `state_dims` are the widths of a key's and a value's head in the layers with a state.
    """
    import torch
    import transformers

    like = random_checkpoint(folder, seed=seed, layers=1)
    config = json.loads((like / "config.json").read_text())
    kind = "qwen3_5_moe" if mixture else "qwen3_5"
    text, vision = config["text_config"], config["vision_config"]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    experts |= {"shared_expert_intermediate_size": 64}
    config |= {"model_type": kind, "architectures": None}
    config["text_config"] = {
        **{key: text[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings", "eos_token_id")},
        **(experts if mixture else {"intermediate_size": 192}),
        "model_type": f"{kind}_text",
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": state_dims[0],
        "linear_value_head_dim": state_dims[1],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
        "dtype": "float32",
    }
    del vision["deepstack_visual_indexes"]
    vision["model_type"] = f"{kind}_vision"
    torch.manual_seed(seed)
    name = "Qwen3_5Moe" if mixture else "Qwen3_5"
    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(made).float()
    for name, tensor in model.named_parameters():
        if "conv1d" in name:
            tensor.data = torch.randn_like(tensor) * 0.5
        elif tensor.ndim >= 2:
            fan_in = 1 if "embed" in name and "patch" not in name else tensor[0].numel() if tensor.ndim != 3 else 96
            tensor.data = torch.randn_like(tensor) * fan_in**-0.5
        elif name.endswith(("norm.weight", "bias")):
            tensor.data = tensor.data + torch.randn_like(tensor) * 0.1
    model.save_pretrained(like)
    return like


def random_windowed(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2.5-VL in the small: windows of two by two tokens in two blocks of three, sections of rotary positions."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    like = random_checkpoint(folder, seed=seed, layers=1)
    config = json.loads((like / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    config |= {"model_type": "qwen2_5_vl", "architectures": None}
    config["text_config"] = {
        **{key: text[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings", "eos_token_id")},
        "model_type": "qwen2_5_vl_text",
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "dtype": "float32",
    }
    config["vision_config"] = {
        "model_type": "qwen2_5_vl_vision",
        **{key: vision[key] for key in ("hidden_size", "num_heads", "out_hidden_size", "in_channels")},
        "depth": 3,
        "intermediate_size": 96,
        "hidden_act": "silu",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).float()
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2:
            fan_in = 1 if "embed_tokens" in name else tensor[0].numel()
            tensor.data = torch.randn_like(tensor) * fan_in**-0.5
        else:
            tensor.data = tensor.data + torch.randn_like(tensor) * 0.1
    model.save_pretrained(like)
    image = json.loads((like / "preprocessor_config.json").read_text())
    image |= {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}}
    (like / "preprocessor_config.json").write_text(json.dumps(image))
    return like
