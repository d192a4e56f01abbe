"""The model families that the local backend runs; a new one is a subclass, listed in FAMILIES. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.errors import ConfigError
from qvl.evidence.coordinates import Coordinates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvl.backends.local.model.decoder import TextDecoder
    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.linear import LinearPlan
    from qvl.backends.local.model.vision import VisionTower
    from qvl.backends.local.text.processor import ImageRules
    from qvl.evidence.prompts import Convention
    from qvl.types import JsonObject


class ModelFamily:
    """Builds the parts of a model when it is loaded; this family is Qwen3-VL, dense and mixture of experts.

    Another family overrides the parts that differ. `model_types` are the values of `model_type` in config.json,
    `convention` is how its models write boxes and points, `videos` whether the engine shows them videos.
    """

    name: str = "Qwen3-VL"
    model_types: tuple[str, ...] = ("qwen3_vl", "qwen3_vl_moe")
    convention: Convention = "0-1000"
    videos: bool = True

    def rules(self, settings: JsonObject) -> ImageRules:
        """Return the rules for resizing pictures and cutting them into patches, from the image processor's settings."""
        from qvl.backends.local.text.processor import ImageRules

        return ImageRules.read(settings)

    def coordinates(self, rules: ImageRules) -> Coordinates:
        """Return how its models write boxes and points; in pixels, of the picture as `rules` resize it."""
        return Coordinates(self.convention, rules.factor, rules.min_pixels, rules.max_pixels)

    def decoder(
        self, model: PreTrainedModel, kernels: Kernels, plan: LinearPlan, *, batch_invariant: bool
    ) -> TextDecoder:
        """Return the text decoder over the weights of `model`; its `layout()` is the shape of a token's KV."""
        language_model, lm_head = model.get_submodule("model.language_model"), model.get_submodule("lm_head")
        return self._decoder_type()(language_model, lm_head, kernels, plan, batch_invariant=batch_invariant)

    def _decoder_type(self) -> type[TextDecoder]:
        from qvl.backends.local.model.decoder import TextDecoder

        return TextDecoder

    def tower(self, model: PreTrainedModel, rules: ImageRules, kernels: Kernels, plan: LinearPlan) -> VisionTower:
        """Return the vision tower over the weights of `model`, which computes picture features."""
        return self._tower_type()(model.get_submodule("model.visual"), rules, kernels, plan)

    def _tower_type(self) -> type[VisionTower]:
        from qvl.backends.local.model.vision import VisionTower

        return VisionTower


class HybridFamily(ModelFamily):
    """Qwen3.5, dense and mixture of experts, and later ones of the same model type; most layers keep a state."""

    name = "Qwen3.5"
    model_types = ("qwen3_5", "qwen3_5_moe")

    def _decoder_type(self) -> type[TextDecoder]:
        from qvl.backends.local.model.hybrid_decoder import HybridDecoder

        return HybridDecoder


class WindowedFamily(ModelFamily):
    """Qwen2.5-VL, whose picture tower attends within windows. It has videos in a form of its own, without times."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    convention: Convention = "pixels"
    videos = False

    def _decoder_type(self) -> type[TextDecoder]:
        from qvl.backends.local.model.windowed import SectionDecoder

        return SectionDecoder

    def _tower_type(self) -> type[VisionTower]:
        from qvl.backends.local.model.windowed import WindowedTower

        return WindowedTower


FAMILIES: tuple[ModelFamily, ...] = (ModelFamily(), HybridFamily(), WindowedFamily())


def family_of(model_type: object, name: str) -> ModelFamily:
    """Return the family of a checkpoint's `model_type`; `name` is the checkpoint's, for the error.

    Raises:
        ConfigError: no entry of FAMILIES supports `model_type`.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    families = " or ".join(family.name for family in FAMILIES)
    raise ConfigError(
        f"unsupported model_type {model_type!r} of {name}: not a {families}",
        hint=f"the local engine runs {known}; 'vllm:…' and 'openvino:…' run what these libraries know, and an endpoint "
        "('openai:…') what it serves",
    )


def takes_videos(model_type: object) -> bool:
    """Return True if models of `model_type` are shown videos in Qwen3-VL's form; False for unknown ones."""
    return any(model_type in family.model_types and family.videos for family in FAMILIES)
