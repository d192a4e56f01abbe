"""The network to train: the checkpoint's dimensions, patches, positions, and a batched vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import Qwen3VLForConditionalGeneration

PATCH: Final = 16
MERGE: Final = 2

SPECIAL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MARKUP_TOKENS: Final = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PLAIN_VOCABULARY: Final = 1024


def token_id(token: str) -> int:
    """Return the id of a special or markup token; they follow the byte-level vocabulary in the order above."""
    return PLAIN_VOCABULARY + (SPECIAL_TOKENS + MARKUP_TOKENS).index(token)


def config_dict() -> dict[str, Any]:
    """Return the checkpoint's config.json in the published format of Qwen3-VL."""
    vocabulary = PLAIN_VOCABULARY + len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": token_id("<|image_pad|>"),
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": token_id("<|endoftext|>"),
            "dtype": "bfloat16",
            "eos_token_id": token_id("<|im_end|>"),
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 256,
            "max_position_embeddings": 8192,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 10000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": vocabulary,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.1",
        "video_token_id": token_id("<|video_pad|>"),
        "vision_config": {
            "deepstack_visual_indexes": [0, 1, 2],
            "depth": 5,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 128,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 256,
            "model_type": "qwen3_vl",
            "num_heads": 4,
            "num_position_embeddings": 64,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
    }


def build(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Return an untrained float32 network whose vision attention is batched over pictures of equal grids."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config_dict())).float()
    attend_in_batches(model)
    return model


def attend_in_batches(model: Qwen3VLForConditionalGeneration) -> None:
    """Replace the per-picture attention loop by one call; valid only if all pictures of a call share a grid."""
    import types

    visual = model.model.visual
    visual.patch_embed.forward = types.MethodType(_linear_patch_embed, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = types.MethodType(_equal_grid_attention, block.attn)


def _linear_patch_embed(self: Any, patches: torch.Tensor) -> torch.Tensor:
    """Return the patch convolution as a matrix product over one frame: the kernels of the two frames are summed."""
    import torch

    kernel = self.proj.weight.sum(2).reshape(self.proj.weight.shape[0], -1)
    if patches.shape[1] != kernel.shape[1]:
        patches = patches.view(-1, 3, 2, PATCH * PATCH)[:, :, 0].reshape(patches.shape[0], -1)
    return torch.nn.functional.linear(patches, kernel, self.proj.bias)


def _equal_grid_attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: object,
) -> torch.Tensor:
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    total, pictures = hidden_states.shape[0], cu_seqlens.shape[0] - 1
    query, key, value = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    heads = [
        part.reshape(pictures, total // pictures, self.num_heads, -1).transpose(1, 2) for part in (query, key, value)
    ]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
    return self.proj(mixed.transpose(1, 2).reshape(total, -1))  # type: ignore[no-any-return]


def patches(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return pictures [n, height, width, 3] as float32 patches [n * rows * columns, 768].

    These are the image processor's patches without the repeated second frame.
    """
    import torch

    count, height, width, _ = pixels.shape
    unit = PATCH * MERGE
    values = torch.from_numpy(pixels).to(torch.get_default_device()).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    values = values.reshape(count, 3, height // unit, MERGE, PATCH, width // unit, MERGE, PATCH)
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return values.reshape(count * (height // PATCH) * (width // PATCH), -1)


def grid(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return the grid_thw rows [n, 3] of pictures [n, height, width, 3]."""
    import torch

    count, height, width, _ = pixels.shape
    return torch.tensor([[1, height // PATCH, width // PATCH]] * count)
