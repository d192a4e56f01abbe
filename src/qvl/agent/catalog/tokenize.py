"""Tokenizer of the index: folded words, and trigrams of Chinese and Japanese text.

Documents and queries use the same functions. A token has only letters and digits, so that user input cannot inject
syntax of FTS5 or SQL.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Final

_WORD: Final = re.compile(r"[^\W_]+")
CJK: Final = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
GRAM: Final = 3
_STOP: Final = """
a an and are as at be by for from give have i in is it like looking me my of on one ones or please show some something
than that the them then these this those to want wanted we what which with would you your find need get
um uma uns umas o os de do da dos das em no na com para por e que quero un una unos unas el la los las del en con y
quiero 的 了 我 要 一 个 和 在 是 有 想 请 吗 这 那 给
"""
_PLURALS: Final = (("s", ""), ("es", ""), ("ies", "y"))
STOP_WORDS: Final = frozenset(_STOP.split())


def fold(text: str) -> str:
    """Return `text` with case, width and diacritics removed: "Chapéu" and "CHAPEU" give the same."""
    if text.isascii():
        return text.lower()
    parts = unicodedata.normalize("NFKD", text)
    bare = "".join(char for char in parts if not unicodedata.combining(char))
    return unicodedata.normalize("NFC", bare).casefold()


def key(text: str) -> str:
    """Return `text`, a facet's name or value, in the form used for comparison: folded, with single spaces."""
    return " ".join(fold(text).split())


def words(text: str) -> Iterator[tuple[str, bool]]:
    """Yield (piece, is_cjk) in order: a word, or a run of Chinese or Japanese characters; `text` must be folded."""
    for word in _WORD.findall(text):
        if word.isascii():
            yield word, False
            continue
        at = 0
        for run in CJK.finditer(word):
            if run.start() > at:
                yield word[at : run.start()], False
            yield run.group(), True
            at = run.end()
        if at < len(word):
            yield word[at:], False


def grams(run: str) -> list[str]:
    """Return the trigram at each position of `run`, unbroken Chinese or Japanese text; at its end they are shorter."""
    return [run[at : at + GRAM] for at in range(len(run))]


def tokens(text: str) -> list[str]:
    """Return all tokens of a document's text; it need not be folded yet."""
    if text.isascii():
        return list(_WORD.findall(text.lower()))
    return [token for word, cjk in words(fold(text)) for token in (grams(word) if cjk else [word])]


def facet_token(name: str, value: str) -> str:
    """Return the token for "`name` is exactly `value`"; both are folded by `key`."""
    return "qf" + hashlib.blake2b(f"{name}\0{value}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def singulars(word: str) -> list[str]:
    """Return the possible singulars of an English, Spanish or Portuguese word."""
    if len(word) <= 3:
        return []
    return [word.removesuffix(end) + singular for end, singular in _PLURALS if word.endswith(end)]
