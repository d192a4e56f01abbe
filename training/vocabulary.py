"""Training of the checkpoint's byte-level BPE on the texts that the model will read and write."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.tiny.render import BRANDS, LANGUAGES, sample_product
from training import tasks
from training.network import MARKUP_TOKENS, PLAIN_VOCABULARY, SPECIAL_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokenizers import Tokenizer

# The published split of Qwen2's tokenizer; both transformers 4 and 5 rebuild it from the class name.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus(seed: int = 0) -> Iterator[str]:
    """Yield every prompt and question, and answers about a few thousand random products."""
    dice = random.Random(f"corpus-{seed}")
    for _ in range(60):
        for prompt in PRODUCT_PROMPTS.values():
            yield prompt.system
            yield prompt.user
        yield "system\nuser\nassistant\n"
    for language in ("en", "zh"):
        for texts in (*tasks.QUESTIONS[language].values(), tasks.SYSTEM_PROMPTS[language], tasks.SMALL_TALK[language]):
            yield from texts * 8
        for table in (tasks.ORDINAL_QUESTIONS, tasks.SAME_QUESTIONS):
            for texts in table[language].values():
                yield from [text.format(number) for text in texts for number in tasks.ORDINALS[language]] * 12
        yield from (*tasks.YES_NO[language], tasks.NO_PICTURE[language]) * 30
    for brand in BRANDS * 40:
        yield from (brand, f" {brand}", f'"{brand}"')
    for _ in range(3000):
        product = sample_product(dice)
        for language in LANGUAGES:
            yield tasks.analysis_answer(product, language)
        for language in ("en", "zh"):
            yield from (tasks.answer(kind, product, language) for kind in tasks.KINDS)


def train() -> Tokenizer:
    """Return a tokenizer of exactly `PLAIN_VOCABULARY` byte-level entries, then the special and the markup tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=PLAIN_VOCABULARY, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != PLAIN_VOCABULARY:
        raise RuntimeError(f"the corpus gave {tokenizer.get_vocab_size()} entries, {PLAIN_VOCABULARY} are needed")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json in the published format."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer.model.save(str(folder))
    added = {
        str(PLAIN_VOCABULARY + number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for number, token in enumerate(SPECIAL_TOKENS + MARKUP_TOKENS)
    }
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],  # noqa: S105
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
