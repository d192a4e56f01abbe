"""The prompts of `analyze()`: versioned, one per language, and part of the cache key.

A changed prompt changes the answers, so every edit must raise `PROMPT_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PROMPT_VERSION: Final = "product-1"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The two texts of one analysis: `system` sets the role, `user` follows the picture(s)."""

    system: str
    user: str


PRODUCT_PROMPTS: Final[dict[str, Prompt]] = {
    "en": Prompt(
        system="You label product pictures. Reply with one JSON object only.",
        user=(
            "Give brand (as printed, null if none), category (one noun, null if no product) and "
            "attributes (such as color, count; values are strings). Keys in English, values in English."
        ),
    ),
    "zh": Prompt(
        system="你为商品图片做标注。只回复一个 JSON 对象。",
        user=(
            "给出 brand（照图上所印，没有则为 null）、category（一个名词，不是商品则为 null）和 "
            "attributes（如 color、count，值为字符串）。键用英文，值用中文。"
        ),
    ),
    "pt": Prompt(
        system="Você rotula fotos de produtos. Responda apenas com um objeto JSON.",
        user=(
            "Informe brand (como impressa, null se não houver), category (um substantivo, null se não for produto) e "
            "attributes (como color, count; valores são strings). Chaves em inglês, valores em português."
        ),
    ),
    "es": Prompt(
        system="Etiquetas fotos de productos. Responde solo con un objeto JSON.",
        user=(
            "Indica brand (como está impresa, null si no hay), category (un sustantivo, null si no es un producto) y "
            "attributes (como color, count; los valores son cadenas). Claves en inglés, valores en español."
        ),
    ),
}

SCHEMA_PROMPTS: Final[dict[str, Prompt]] = {
    "en": Prompt(
        system="You read pictures. Reply with one JSON object only.",
        user="Fill in this JSON schema from the picture, in English; null where the picture does not tell:\n{schema}",
    ),
    "zh": Prompt(
        system="你读取图片中的信息。只回复一个 JSON 对象。",
        user="根据图片用中文填写下面的 JSON schema；图片上没有的填 null：\n{schema}",
    ),
    "pt": Prompt(
        system="Você lê imagens. Responda apenas com um objeto JSON.",
        user="Preencha este JSON schema a partir da imagem, em português; null onde a imagem não informa:\n{schema}",
    ),
    "es": Prompt(
        system="Lees imágenes. Responde solo con un objeto JSON.",
        user="Rellena este JSON schema a partir de la imagen, en español; null donde la imagen no lo dice:\n{schema}",
    ),
}

RETRY_PROMPTS: Final[dict[str, str]] = {
    "en": "That was no valid answer: {error}. Reply again with the JSON object only.",
    "zh": "上面的回答无效：{error}。请只回复 JSON 对象。",
    "pt": "A resposta não é válida: {error}. Responda de novo apenas com o objeto JSON.",
    "es": "La respuesta no es válida: {error}. Responde de nuevo solo con el objeto JSON.",
}

LANGUAGES: Final = tuple(PRODUCT_PROMPTS)
