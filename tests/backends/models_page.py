"""Writes docs/models.md: which model in which form which backend runs, and the test that shows it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qvl.backends.local.model.family import FAMILIES

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "models.md"
BACKENDS: Final = ("local", "vllm", "openvino", "openai")
FORMS: Final = ("float32", "bfloat16", "int8 (`quantize`)", "FP8", "AWQ", "GPTQ", "compressed-tensors", "LoRA")
LOCAL: Final = "tests/backends/local/"
VLLM: Final = "tests/backends/vllm/"
CONVERTED: Final = "tests/backends/openvino/test_conversion.py"
MIXTURES: Final = ("qwen3_vl_moe", "qwen3_5_moe")

ITS_OWN: Final[Mapping[str, str]] = {"vllm": "vLLM's own", "openvino": "OpenVINO's own", "openai": "the server's own"}
HERE: Final = "tests/backends/test_models_page.py"

_FLOAT32: Final[Mapping[str, str]] = {
    "qwen3_vl": f"{LOCAL}test_equals_generate.py::test_100_mixed_requests_on_a_random_model",
    "qwen3_vl_moe": f"{LOCAL}test_equals_generate.py::test_a_mixture_of_experts",
    "qwen3_5": f"{LOCAL}test_hybrid.py::test_mixed_requests_equal_generate",
    "qwen3_5_moe": f"{LOCAL}test_hybrid.py::test_mixed_requests_equal_generate",
    "qwen2_5_vl": f"{LOCAL}test_windowed.py::test_mixed_requests_equal_generate",
}
_ADAPTERS: Final[Mapping[str, str]] = {
    "qwen3_vl": f"{LOCAL}test_adapters.py::test_a_batch_of_adapters_and_base_equals_peft",
    "qwen3_5": f"{LOCAL}test_adapters.py::test_adapters_of_layers_with_states_equal_peft",
    "qwen2_5_vl": f"{LOCAL}test_adapters.py::test_adapters_of_a_windowed_tower_equal_peft",
}
_UNPACKED: Final = f"{LOCAL}test_models.py::test_quantised_weights_answer_as_the_numbers_that_they_stand_for"
# What is told beside a cell.
NOTES: Final[Mapping[tuple[str, str, str], str]] = {
    ("qwen3_vl", "float32", "openvino"): "converted to 16 bits",
    ("qwen3_vl", "int8 (`quantize`)", "openvino"): "converted so, and to 4 bits",
    **{(model, "LoRA", "local"): "attention" for model in MIXTURES},
    **{(model, form, "vllm"): "not on a CPU" for model in ("qwen3_5", "qwen3_5_moe") for form in ("float32", "LoRA")},
    **{(kind, "LoRA", "openai"): "chosen as the model" for family in FAMILIES for kind in family.model_types},
}
_HEAD: Final = """# Models, forms and backends

Which checkpoint runs on which backend, in which form, and what shows it. Made by `make docs`; a test asks that every
model type of the local engine has its rows and that every test linked here is there.

- **tested**: a test of this project asks a checkpoint of that type and form, with random weights or the bundled one.
  `local` in float32: token for token what transformers writes, text and pictures, alone and in batches. Quantised
  forms: what their numbers say, exactly. bfloat16 (`batch_invariant`) and int8: the same alone and in a batch. LoRA:
  token for token what PEFT writes. `vllm`, `openvino`: the answers of `local`.
- **refused**: in one line that says what to take instead, before anything is downloaded or loaded where that is seen.
  `openvino` names the command that converts a checkpoint to its own form.
- **vLLM's own**, **OpenVINO's own**: left to that library, which knows whether it can; nothing of it is tested here.
- **the server's own**: an endpoint serves what it serves; requests, pictures and answers are tested against real
  servers ([README](../README.md#serving)), not by model.

vLLM's CPU build computes a gated delta rule in bfloat16 and without LoRA alone: in float32 its engine ends at the first
request. So Qwen3.5's test there compares tokens up to where two are nearly as likely.

Published weights are not part of the tests: they do not fit there. `local` unpacks quantised checkpoints to the dtype
of the device.

| model type | form | local | vllm | openvino | openai |
|---|---|---|---|---|---|
"""


_VIDEOS: Final = f"""
## Videos

The frames and their times are chosen before any backend is asked, and are the same for all.

| backend | a video reaches the model | shown by |
|---|---|---|
| local | as a video, in the model's own form: token for token what transformers writes | \
[tested](../{LOCAL}test_video.py) |
| vllm | as a video, with the prompt tokens of `local`; two to a request (`limit_mm_per_prompt`), of more the frames. \
A vLLM that has no renderer yet: the frames | [tested](../{VLLM}test_videos.py) |
| openvino | the frames, as pictures behind their times | [tested](../tests/pipeline/test_videos.py) |
| openai, to qvl-serve | as the file, with the times and the size of the frames, up to the videos and the bytes of a \
request that its `/v1/models` tells (`max_videos`, `max_body_bytes`); beyond, the frames | \
[tested](../tests/backends/openai/test_video_forms.py) |
| openai, to vLLM that takes `media_io_kwargs` | as the frames, with their times; one to a request | \
[tested](../tests/backends/openai/test_videos.py) |
| openai, to others, and to several that take videos in different forms | the frames, as pictures behind their times | \
[tested](../tests/backends/openai/test_videos.py) |

Where the frames are sent as pictures a note says so: in `Result.notes`, and in the answers of qvl-serve, as `notes`
beside the usage, to which a client of qvl adds its own. Of a stream the last event has them. How videos
reached the endpoint is part of the cache key.
"""


def cell(model: str, form: str, backend: str) -> tuple[str, str]:
    """Return what is said of a model type in a form on a backend, and the test that shows it, "" where none does."""
    if backend == "vllm":
        return _vllm(model, form)
    if backend == "openvino":
        return _openvino(model, form)
    return _local(model, form) if backend == "local" else (ITS_OWN[backend], "")


def _local(model: str, form: str) -> tuple[str, str]:
    if form == "float32":
        return "tested", _FLOAT32[model]
    if form == "bfloat16":
        return "tested", f"{LOCAL}test_models.py::test_in_bfloat16_answers_are_the_same_alone_and_in_a_batch"
    if form == "LoRA":
        mixture = f"{LOCAL}test_models.py::test_adapters_of_a_mixtures_attention_equal_peft"
        return "tested", _ADAPTERS.get(model, mixture)
    if not form.startswith("int8"):
        return "tested", _UNPACKED
    if model in MIXTURES:
        return "refused", f"{LOCAL}test_models.py::test_int8_takes_no_mixture"
    return "tested", f"{LOCAL}test_models.py::test_in_int8_answers_are_the_same_alone_and_in_a_batch"


def _vllm(model: str, form: str) -> tuple[str, str]:
    if form.startswith("int8"):
        return "refused", f"{HERE}::test_quantize_is_the_local_engines"
    if model == "qwen3_vl" and form == "float32":
        return "tested", f"{VLLM}test_engine.py::test_greedy_answers_equal_those_of_the_local_backend"
    if model == "qwen3_5" and form == "bfloat16":
        return "tested", f"{VLLM}test_hybrid.py::test_qwen3_5_answers_as_in_the_local_engine"
    if model == "qwen3_vl" and form == "LoRA":
        return "tested", f"{VLLM}test_adapters.py::test_named_adapters_answer_as_in_the_local_engine"
    return ITS_OWN["vllm"], ""


def _openvino(model: str, form: str) -> tuple[str, str]:
    if form == "LoRA":
        return "refused", f"{HERE}::test_openvino_takes_no_adapter"
    if form in ("FP8", "AWQ", "GPTQ", "compressed-tensors"):
        return ("refused", f"{CONVERTED}::test_a_checkpoint_that_was_not_converted_is_refused_with_the_command")
    if model == "qwen3_vl" and form == "float32":
        return ("tested", f"{CONVERTED}::test_converted_weights_answer_token_for_token_as_the_checkpoint")
    if model == "qwen3_vl" and form.startswith("int8"):
        return "tested", f"{CONVERTED}::test_weights_are_packed_and_say_so"
    return ITS_OWN["openvino"], ""


def models() -> list[str]:
    """Return the model types that the local engine runs."""
    return [kind for family in FAMILIES for kind in family.model_types]


def page() -> str:
    """Return the page."""
    rows = [f"| `{model}` | {form} | {' | '.join(_told(model, form))} |\n" for model in models() for form in FORMS]
    return _HEAD + "".join(rows) + _VIDEOS


def _told(model: str, form: str) -> list[str]:
    told = []
    for backend in BACKENDS:
        (said, test), note = cell(model, form, backend), NOTES.get((model, form, backend))
        shown = f"[{said}](../{test.partition('::')[0]})" if test else said
        told.append(f"{shown}, {note}" if note else shown)
    return told


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
