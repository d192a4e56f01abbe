"""The families of models that the local backend runs: a new one is a subclass and its place in FAMILIES. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvl.backends.local.model.decoder import TextDecoder
    from qvl.backends.local.model.kernels import Kernels
    from qvl.backends.local.model.vision import VisionTower
    from qvl.backends.local.text.processor import ImageRules
    from qvl.types import JsonObject


class ModelFamily:
    """A family of models by its parts, each built when a model is loaded; this one is Qwen3-VL, dense and mixture.

    Another family overrides what it has of its own. `model_types` are the values of `model_type` in config.json.
    """

    name: str = "Qwen3-VL"
    model_types: tuple[str, ...] = ("qwen3_vl", "qwen3_vl_moe")

    def rules(self, settings: JsonObject) -> ImageRules:
        """Return the rules by which pictures are sized and cut, from the image processor's settings."""
        from qvl.backends.local.text.processor import ImageRules

        return ImageRules.read(settings)

    def decoder(self, model: PreTrainedModel, kernels: Kernels, *, batch_invariant: bool) -> TextDecoder:
        """Return what runs the text layers, and says in `layout()` what a sequence keeps of each."""
        from qvl.backends.local.model.decoder import TextDecoder

        language_model, lm_head = model.get_submodule("model.language_model"), model.get_submodule("lm_head")
        return TextDecoder(language_model, lm_head, kernels, batch_invariant=batch_invariant)

    def tower(self, model: PreTrainedModel, rules: ImageRules, kernels: Kernels) -> VisionTower:
        """Return what turns pictures into features."""
        from qvl.backends.local.model.vision import VisionTower

        return VisionTower(model.get_submodule("model.visual"), rules, kernels)


FAMILIES: tuple[ModelFamily, ...] = (ModelFamily(),)


def family_of(model_type: object, name: str) -> ModelFamily:
    """Return the family that `model_type`, of the checkpoint `name`, belongs to.

    Raises:
        ConfigError: none of FAMILIES knows it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    families = " or ".join(family.name for family in FAMILIES)
    raise ConfigError(
        f"{name} is a {model_type!r}, not a {families}",
        hint=f"local: takes the model_type {known}; openai: takes what its server runs",
    )
