"""Questions and answers of the bundled model, for its training and its evaluation.

Analyses use the exact prompts of `qvl.analysis.prompts`. Single questions have short answers in the language of the
question.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Final

from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.tiny.render import CATEGORY_NAMES, COLOR_NAMES, DrawnProduct, labels

KINDS: Final = ("brand", "category", "color", "count", "describe")
ORDINAL_KINDS: Final = ("brand", "category", "color", "count")
SAME_KINDS: Final = ("color",)

QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "brand": (
            "What brand is it?",
            "Which brand?",
            "What does the label say?",
            "Which brand is this?",
            "What is the brand?",
            "What brand is this?",
            "Brand?",
            "Read the label.",
            "Which brand is it?",
            "What brand is shown?",
        ),
        "category": (
            "What category is it?",
            "What kind of product is it?",
            "What is it?",
            "What product is this?",
            "What is this?",
            "Which category?",
            "Category?",
            "What kind of product is this?",
            "What type of product is it?",
        ),
        "color": (
            "What colour is it?",
            "What color is it?",
            "Which colour?",
            "Which color?",
            "What is the colour?",
            "What is the color?",
            "Colour?",
            "Color?",
            "What colour is the product?",
            "What color is this?",
        ),
        "count": (
            "How many are there?",
            "How many?",
            "How many products are there?",
            "Count them.",
            "How many do you see?",
            "How many items are there?",
            "Count?",
            "How many products are in the picture?",
        ),
        "describe": (
            "Describe it.",
            "Describe the picture.",
            "Describe this picture.",
            "What do you see?",
            "Describe the product.",
            "Describe the image.",
            "What is in the picture?",
            "Describe this image.",
            "What is in this picture?",
        ),
    },
    "zh": {
        "brand": (
            "是什么品牌？",
            "这是什么品牌？",
            "什么品牌？",
            "标签上写的是什么？",
            "哪个品牌？",
            "品牌是什么？",
            "品牌？",
            "它是什么品牌？",
            "标签写了什么？",
            "这是哪个牌子？",
        ),
        "category": (
            "是什么商品？",
            "这是什么商品？",
            "这是什么？",
            "属于什么类别？",
            "什么类别？",
            "是哪种商品？",
            "类别？",
            "它是什么类别？",
            "这是什么东西？",
        ),
        "color": (
            "是什么颜色？",
            "这是什么颜色？",
            "什么颜色？",
            "它是什么颜色？",
            "颜色？",
            "颜色是什么？",
            "商品是什么颜色？",
            "哪种颜色？",
        ),
        "count": (
            "有几个？",
            "有多少个？",
            "一共有几个？",
            "图中有几个？",
            "数量？",
            "数一数有几个。",
            "有几件商品？",
            "图里有多少个？",
        ),
        "describe": (
            "描述一下。",
            "描述这张图片。",
            "请描述图片。",
            "你看到了什么？",
            "描述商品。",
            "请描述一下。",
            "图中有什么？",
            "描述一下图片。",
            "图片里有什么？",
        ),
    },
}

ORDINAL_QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "brand": ("What brand is the {}?", "What brand is the {} picture?", "Which brand is the {} one?"),
        "category": ("What is the {}?", "What category is the {}?", "What product is the {} one?"),
        "color": (
            "What colour is the {}?",
            "What color is the {}?",
            "What colour is the {} picture?",
            "What color is the {} one?",
        ),
        "count": ("How many are in the {}?", "How many are in the {} picture?", "How many are there in the {}?"),
    },
    "zh": {
        "brand": ("{}是什么品牌？", "{}图片是什么品牌？", "{}的品牌是什么？"),
        "category": ("{}是什么？", "{}是什么商品？", "{}图片是什么商品？"),
        "color": ("{}是什么颜色？", "{}图片是什么颜色？", "{}的颜色是什么？"),
        "count": ("{}有几个？", "{}图片里有几个？", "{}有多少个？"),
    },
}
ORDINALS: Final = {"en": ("first", "second", "third"), "zh": ("第一张", "第二张", "第三张")}

SAME_QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "brand": ("Are they the same brand?", "Is the brand the same?", "Do they have the same brand?"),
        "category": ("Are they the same category?", "Are they the same kind of product?", "Is the category the same?"),
        "color": (
            "Are they the same colour?",
            "Are they the same color?",
            "Do they have the same colour?",
            "Is the color the same?",
        ),
    },
    "zh": {
        "brand": ("品牌相同吗？", "它们是同一个品牌吗？", "是同一个品牌吗？"),
        "category": ("类别相同吗？", "它们是同一类商品吗？", "是同一类商品吗？"),
        "color": ("颜色相同吗？", "它们的颜色相同吗？", "是同一种颜色吗？"),
    },
}
YES_NO: Final = {"en": ("yes", "no"), "zh": ("是", "不是")}
NO_PICTURE: Final = {"en": "I need a picture.", "zh": "请给我一张图片。"}
SMALL_TALK: Final = {
    "en": (
        "Hello",
        "Hi",
        "Hello!",
        "Hi there.",
        "Who are you?",
        "What can you do?",
        "Help me.",
        "Say hello.",
        "Thanks.",
    ),
    "zh": ("你好", "你好！", "你是谁？", "你能做什么？", "帮帮我。", "谢谢。"),
}

SYSTEM_PROMPTS: Final = {
    "en": (
        "You are a helpful assistant.",
        "Answer briefly.",
        "Be terse.",
        "You are a shop assistant.",
        "Answer in one word.",
        "You look at pictures.",
        "Be concise and correct.",
        "Answer the question about the picture.",
        "Be polite.",
        "You are an expert in product pictures.",
        "Reply in English.",
        "Look carefully at the label.",
        "Do not guess.",
        "You are a careful assistant for a web shop.",
        "Reply with the answer only.",
        "You are Qwen.",
    ),
    "zh": (
        "你是一个有用的助手。",
        "请简短回答。",
        "你是店员。",
        "用一个词回答。",
        "请用中文回答。",
        "仔细看标签。",
        "回答关于图片的问题。",
        "不要猜。",
        "你是商品图片专家。",
        "只回复答案。",
    ),
}

PLURALS: Final = {"watch": "watches"}
_NUMBER_WORDS = {"en": ("One", "Two", "Three", "Four"), "zh": ("一个", "两个", "三个", "四个")}
_ABSENT = {
    "en": {"brand": "none", "category": "no product", "color": "no product", "count": "0", "describe": "No product."},
    "zh": {"brand": "无", "category": "没有商品", "color": "没有商品", "count": "0", "describe": "没有商品。"},
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer; `pictures` are positions in the pool, shown before the text unless `text_first`."""

    question: str
    answer: str
    pictures: tuple[int, ...] = ()
    text_first: bool = False


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A system prompt and turns. If `parallel`, every turn sees the first turn's pictures but no other turn."""

    turns: tuple[Turn, ...]
    system: str | None = None
    parallel: bool = False


def analysis_answer(product: DrawnProduct | None, language: str) -> str:
    """Return the JSON answer that `analyze()` expects."""
    return json.dumps(labels(product, language), ensure_ascii=False)


def answer(kind: str, product: DrawnProduct | None, language: str) -> str:
    """Return the short answer to a single question."""
    if product is None:
        return _ABSENT[language][kind]
    if kind == "brand":
        return product.brand or _ABSENT[language]["brand"]
    if kind == "category":
        return CATEGORY_NAMES[language][product.category]
    if kind == "color":
        return COLOR_NAMES[language][product.color]
    return str(product.count) if kind == "count" else _description(product, language)


def _description(product: DrawnProduct, language: str) -> str:
    number = _NUMBER_WORDS[language][product.count - 1]
    if language == "zh":
        color, noun = COLOR_NAMES["zh"][product.color], CATEGORY_NAMES["zh"][product.category]
        return f"{number}{color}的{product.brand or ''}{noun}。"
    noun = product.category if product.count == 1 else PLURALS.get(product.category, product.category + "s")
    return " ".join(part for part in (number, product.color, product.brand, noun) if part) + "."


def question(kind: str, language: str, dice: random.Random) -> str:
    """Return a random paraphrase of a question, sometimes without capitals or punctuation."""
    return _carelessly(dice.choice(QUESTIONS[language][kind]), dice)


def ordinal_turn(kind: str, position: int, product: DrawnProduct | None, language: str, dice: random.Random) -> Turn:
    """Return a turn about the picture at `position` (0 is the first)."""
    text = dice.choice(ORDINAL_QUESTIONS[language][kind]).format(ORDINALS[language][position])
    return Turn(_carelessly(text, dice), answer(kind, product, language))


def same_turn(kind: str, first: DrawnProduct, second: DrawnProduct, language: str, dice: random.Random) -> Turn:
    """Return a turn that asks if two products have the same value in a field."""
    agree = getattr(first, kind) == getattr(second, kind)
    return Turn(_carelessly(dice.choice(SAME_QUESTIONS[language][kind]), dice), YES_NO[language][0 if agree else 1])


def analysis(pictures: tuple[int, ...], product: DrawnProduct | None, language: str) -> Dialogue:
    """Return the dialogue of `analyze()`; of several pictures the first is the labelled one."""
    prompt = PRODUCT_PROMPTS[language]
    return Dialogue((Turn(prompt.user, analysis_answer(product, language), pictures),), system=prompt.system)


def system_prompt(language: str, dice: random.Random) -> str | None:
    """Return None in half of the cases, otherwise one or two short sentences."""
    if dice.random() < 0.5:
        return None
    parts = dice.sample(SYSTEM_PROMPTS[language], dice.choice((1, 1, 2)))
    return (" " if language == "en" else "").join(parts)


def without_picture(language: str, dice: random.Random) -> Dialogue:
    """Return a dialogue without a picture."""
    kind = dice.choice(("talk", "analysis", *KINDS))
    if kind == "analysis":
        prompt = PRODUCT_PROMPTS[language]
        return Dialogue((Turn(prompt.user, NO_PICTURE[language]),), system=prompt.system)
    text = dice.choice(SMALL_TALK[language]) if kind == "talk" else question(kind, language, dice)
    return Dialogue((Turn(text, NO_PICTURE[language]),), system=system_prompt(language, dice))


def _carelessly(text: str, dice: random.Random) -> str:
    if dice.random() < 0.9:
        return text
    text = text.rstrip("?.？。")
    return text.lower() if dice.random() < 0.5 else text
