"""A Qwen3-VL or Qwen3.5 of random weights and about 130 million parameters, or in the true shapes of the 2B and the 8B.

Speed does not depend on the values of weights, so nothing is downloaded. The tokenizer is the bundled model's, and
weights are stored in bfloat16 as those of the published checkpoints are.

Every token that is not a whole word of ASCII letters has an embedding of zeros in the input and output layers, and so
is never the most likely one: no answer ends before its limit, even if a server does not support `ignore_eos`, and
every token is visible text, so that a client can count the tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

# Whether what lies in a folder was made by this code.
RECIPE = "2"
SHAPES: dict[str, dict[str, Any]] = {
    "130m": {
        "text": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 12,
                 "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32768, "max_position_embeddings": 8192},
        "mrope_section": [12, 10, 10],
        "vision": {"hidden_size": 512, "intermediate_size": 2048, "depth": 8, "num_heads": 8, "out_hidden_size": 768,
                   "deepstack_visual_indexes": [2, 5], "num_position_embeddings": 2304},
        "tie": True,
    },
    "2b": {
        "text": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144},
        "mrope_section": [24, 20, 20],
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16,
                   "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304},
        "tie": True,
    },
    "8b": {
        "text": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144},
        "mrope_section": [24, 20, 20],
        "vision": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
                   "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304},
        "tie": False,
    },
}  # fmt: skip


# A Qwen3.5 of the 130m's width and depth, with the 0.8B's proportions: three of four layers have a state.
HYBRID: dict[str, Any] = {
    "head_dim": 128, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 12,
    "linear_num_key_heads": 6, "linear_num_value_heads": 6, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip


def hybrid(made: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen3.5 for that of a Qwen3-VL."""
    text, vision = made["text_config"], made["vision_config"]
    kept = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id",
            "dtype", "tie_word_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [6, 5, 5]}  # fmt: skip
    of_text = {key: text[key] for key in kept if key in text} | HYBRID
    of_text |= {"model_type": "qwen3_5_text", "rope_parameters": rope}
    of_tower = {key: value for key, value in vision.items() if key != "deepstack_visual_indexes"}
    of_tower["model_type"] = "qwen3_5_vision"
    return {**made, "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": of_text, "vision_config": of_tower}  # fmt: skip


def config(shape: str, bundled: Path, layers: int | None = None, tokenizer: Path | None = None) -> dict[str, Any]:
    """config.json of `shape`, with no more than `layers` text layers, special tokens as in the bundled model.

    Or as in the published Qwen3-VL's `tokenizer`.
    """
    sizes = SHAPES[shape]
    made = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    made["tie_word_embeddings"] = sizes["tie"]
    made["text_config"].update(
        sizes["text"] | ({"num_hidden_layers": layers} if layers else {}),
        tie_word_embeddings=sizes["tie"],
        rope_theta=5000000,
        rope_scaling={"mrope_interleaved": True, "mrope_section": sizes["mrope_section"], "rope_type": "default"},
    )
    made["vision_config"].update(sizes["vision"])
    if tokenizer is not None:
        special = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        ids = {token["content"]: token["id"] for token in special}
        for name in ("image", "video"):
            made[f"{name}_token_id"] = ids[f"<|{name}_pad|>"]
        for name in ("start", "end"):
            made[f"vision_{name}_token_id"] = ids[f"<|vision_{name}|>"]
        made["text_config"].update(
            vocab_size=-(-(max(ids.values()) + 1) // 128) * 128,
            eos_token_id=ids["<|im_end|>"],
            bos_token_id=ids["<|endoftext|>"],
        )
    return dict(made)


def words(bundled: Path) -> list[int]:
    """Ids of the tokens that are a space and a word of ASCII letters."""
    vocabulary = json.loads((bundled / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return [
        index for token, index in vocabulary.items() if token[0] == "\u0120" and token[1:].isascii() and len(token) > 1
    ]


def write(
    folder: Path,
    shape: str = "130m",
    dtype: str = "bfloat16",
    layers: int | None = None,
    tokenizer: Path | None = None,
    family: str = "qwen3_vl",
) -> Path:
    """Builds the checkpoint in `folder` unless it is there; returns `folder`.

    `tokenizer` is a folder with the files of a published Qwen3-VL's tokenizer, in place of the bundled one.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    from qvl.backends.local.model.model_folder import bundled_folder

    recipe = (
        f"{RECIPE} {shape} {dtype}" + (f" {layers} layers" if layers else "") + (f" {tokenizer}" if tokenizer else "")
    )
    recipe += f" {family}" if family != "qwen3_vl" else ""
    if (folder / "recipe").is_file() and (folder / "recipe").read_text(encoding="utf-8") == recipe:
        return folder
    bundled = bundled_folder()
    made = config(shape, bundled, layers, tokenizer)
    of_tokens = tokenizer or bundled
    made["text_config"]["dtype"] = dtype
    if family == "qwen3_5":
        made = hybrid(made)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    settings = json.loads(json.dumps(made))
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    torch.set_default_dtype(torch.float32)
    silent = torch.ones(made["text_config"]["vocab_size"], dtype=torch.bool)
    silent[words(of_tokens)] = False
    for table in (model.model.language_model.embed_tokens, model.lm_head):
        table.weight.data[silent] = 0
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: t.contiguous()
        for name, t in model.state_dict().items()
        if not (made["tie_word_embeddings"] and name == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(made, indent=2), encoding="utf-8")
    image = json.loads((bundled / "preprocessor_config.json").read_text(encoding="utf-8"))
    image = {key: value for key, value in image.items() if key not in ("min_pixels", "max_pixels")}
    image["size"] = {"shortest_edge": 65536, "longest_edge": 262144}
    (folder / "preprocessor_config.json").write_text(json.dumps(image), encoding="utf-8")
    video = json.loads((bundled / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json")
    for name in names:
        shutil.copy(of_tokens / name, folder / name)
    generation = json.loads((bundled / "generation_config.json").read_text(encoding="utf-8"))
    generation["eos_token_id"] = [made["text_config"][f"{name}_token_id"] for name in ("eos", "bos")]
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (folder / "recipe").write_text(recipe, encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="130m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--family", choices=("qwen3_vl", "qwen3_5"), default="qwen3_vl")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a published Qwen3-VL's tokenizer")
    arguments = parser.parse_args()
    print(
        write(
            arguments.folder, arguments.shape, arguments.dtype, tokenizer=arguments.tokenizer, family=arguments.family
        )
    )
