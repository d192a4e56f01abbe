"""Export of the checkpoint in the published format of Qwen3-VL, which transformers 4.57 and 5 both load.

`save_pretrained` of transformers 5 is not used: its config and tokenizer files do not load in 4.57.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from training import vocabulary
from training.network import MERGE, PATCH, config_dict, token_id
from training.pictures import MAX_PIXELS, MIN_PIXELS

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

CHAT_TEMPLATE: Final = Path(__file__).parent / "chat_template.jinja"


def preprocessor_dict(kind: str, name: str) -> dict[str, Any]:
    """Return preprocessor_config.json for `kind` image_processor_type, or that of videos for video_processor_type.

    The bounds are given twice because the slow processor of transformers 4.57 ignores `size`.
    """
    return {
        "max_pixels": MAX_PIXELS,
        "min_pixels": MIN_PIXELS,
        "size": {"longest_edge": MAX_PIXELS, "shortest_edge": MIN_PIXELS},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        kind: name,
    }


def generation_dict() -> dict[str, Any]:
    """Return generation_config.json: greedy, because the answers are short facts."""
    return {
        "bos_token_id": token_id("<|endoftext|>"),
        "do_sample": False,
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "pad_token_id": token_id("<|endoftext|>"),
        "transformers_version": "4.57.1",
    }


def export(state: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a complete checkpoint. `state` is the network's state dict; weights are stored in bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    _write(folder / "config.json", config_dict())
    _write(folder / "generation_config.json", generation_dict())
    image = preprocessor_dict("image_processor_type", "Qwen2VLImageProcessorFast")
    _write(folder / "preprocessor_config.json", image)
    _write(
        folder / "video_preprocessor_config.json", preprocessor_dict("video_processor_type", "Qwen3VLVideoProcessor")
    )
    _write(folder / "chat_template.json", {"chat_template": template})
    vocabulary.write(tokenizer, folder, template)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint that `export` wrote, in float32."""
    from safetensors.torch import load_file

    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    return state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"]}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
