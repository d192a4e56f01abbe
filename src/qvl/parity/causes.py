"""The causes that a comparison recognises, each with its remedy."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qvl.parity.differences import Layer


@dataclass(frozen=True, slots=True)
class Cause:
    """A recognised cause: its short name, a title, the layer where it parts the sides, evidence, and the remedy.

    `cases` is in how many cases it was seen; `certain` is False where the evidence fits other causes too.
    """

    name: str
    title: str
    layer: Layer
    evidence: str
    remedy: str
    cases: int = 0
    certain: bool = True


_KNOWN: Final = MappingProxyType(
    {
        "exif": (
            "EXIF orientation is not applied",
            "pixels",
            "turn pictures upright before the model sees them: let qvl or qvl-serve read them, or call "
            "PIL.ImageOps.exif_transpose in the server",
        ),
        "alpha": (
            "alpha is laid on another colour, or dropped",
            "pixels",
            "lay transparent pictures on white before the model sees them, as qvl and Qwen's own loader do",
        ),
        "gate": (
            "the pixels differ before any model",
            "pixels",
            "compare the versions of qvl and Pillow, and the sources of the pictures",
        ),
        "budget": (
            "another pixel budget",
            "picture tokens",
            "set the same max_pixels and min_pixels on both sides: --max-pixels, or mm_processor_kwargs of the server",
        ),
        "patch": (
            "another patch size",
            "picture tokens",
            "use the checkpoint's own preprocessor_config.json: Qwen3-VL has patch_size 16, Qwen2.5-VL 14",
        ),
        "system": (
            "another default system message",
            "template",
            "set the system message in the request, or the same chat template on both sides",
        ),
        "template": (
            "another chat template",
            "template",
            "use the checkpoint's own chat_template.json; a server's --chat-template overrides it",
        ),
        "tokenizer": (
            "another revision of the tokenizer",
            "prompt",
            "use one revision of tokenizer.json and its added tokens on both sides",
        ),
        "prompt": (
            "another template or tokenizer",
            "prompt",
            "compare chat template and tokenizer files; a server with /tokenize or return_token_ids shows which",
        ),
        "dtype": (
            "another precision of numbers (dtype)",
            "log-probabilities",
            "start both sides with one dtype: --dtype of the server, -O dtype=… of qvl",
        ),
        "quantisation": (
            "quantised weights on one side",
            "log-probabilities",
            "compare with the unquantised weights, or accept it and set budgets for what it costs",
        ),
        "adapter": (
            "a LoRA adapter that one side lacks, or another one",
            "log-probabilities",
            "load the same adapter on both sides: adapter=… of qvl, --lora-modules of vLLM (its name is the model)",
        ),
        "kernels": (
            "other arithmetic from the same weights: another chip, kernel or library",
            "log-probabilities",
            "nothing is set up wrongly: set budgets for what it costs; float32 on both sides shows if more differs",
        ),
        "weights": (
            "other weights: a layer, the revision, or a LoRA adapter that is missing",
            "log-probabilities",
            "compare revision and checksums of the checkpoints, and the adapters that the server has loaded",
        ),
        "sampling": (
            "sampling is applied (generation_config)",
            "text",
            "start the server with --generation-config vllm, or send temperature 0, top_k and repetition_penalty",
        ),
        "penalty": (
            "a penalty is applied (generation_config)",
            "text",
            "start the server with --generation-config vllm, or send repetition_penalty 1.0",
        ),
        "stop": (
            "other stop tokens",
            "text",
            "use the checkpoint's own generation_config.json: its eos_token_id ends answers",
        ),
        "length": (
            "another limit on the length of answers",
            "text",
            "set max_tokens in the request; a server's context or --max-tokens may cut it",
        ),
        "batch": (
            "the answer depends on what else is in the batch",
            "log-probabilities",
            "compute each answer as if alone: batch_invariant=True of qvl, VLLM_BATCH_INVARIANT=1 of vLLM; or raise "
            "the tolerance to the noise that --self-check measures",
        ),
        "prefix-cache": (
            "the answer depends on the prefix cache",
            "log-probabilities",
            "start the server without it: --no-enable-prefix-caching of vLLM, prefix_cache=False of qvl",
        ),
        "near-ties": (
            "near ties fell the other way",
            "text",
            "nothing is broken: both sides give both tokens almost the same probability; a schema or shorter answers "
            "have fewer such places",
        ),
    }
)


def cause(name: str, evidence: str, cases: int = 0, *, certain: bool = True, layer: Layer | None = None) -> Cause:
    """Return the cause `name` with its title, layer and remedy."""
    title, own, remedy = _KNOWN[name]
    return Cause(name, title, layer or own, evidence, remedy, cases, certain)  # type: ignore[arg-type]
