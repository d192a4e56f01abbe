"""Parser of prices in the formats of many countries, distinguishing decimal and grouping separators.

`1.299,00 €`, `1'299.00`, `₹1,23,456.78`, `12,-` and `９９．９０` are unambiguous. `1,299` and `1.299`
are not: they follow the convention of the other prices of their column, and are refused if those do not
show one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

# Signs that only ever group, beside the comma and the point that may do either.
_SPACES: Final = " \u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_APOSTROPHES: Final = "'\u2018\u2019\u02bc\u00b4`\uff07"
_SAME: Final = str.maketrans(
    {
        **dict.fromkeys(_SPACES, " "),
        **dict.fromkeys(_APOSTROPHES, "'"),
        **dict.fromkeys("\uff0c", ","),
        **dict.fromkeys("\uff0e", "."),
        "\u066c": "'",
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015", "-"),
    }
)
_CODE_LIST: Final = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD "
    "CAD CDF CHF CLF CLP CNH CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS "
    "GIP GMD GNF GTQ GYD HKD HNL HRK HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW "
    "KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN "
    "NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RMB RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP "
    "SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VES VND VUV "
    "WST XAF XCD XOF XPF YER ZAR ZMW ZWL "
)
_NAME_LIST: Final = (
    "kr kr. đ vnđ zł zl kč kc ft lei leu лв лв. руб руб. р р. грн грн. тг ден дин din rs rs. rp rp. rm r bs bs. "
    "s/ s/. b/. q l tl km kn sfr sfr. fr fr. ksh tsh ush br dh dhs lek nt us hk euro euros eur. dollar "
    "dollars usd. yen yuan 元 円 圆 圓 块 원 د.إ ر.س ج.م د.ك د.ب ر.ق ر.ع. ر.ع د.أ ل.ل د.ج د.م. د.م د.ت د.ع ريال "
    "درهم دينار جنيه تومان ریال "
)
_CODES: Final = frozenset(_CODE_LIST.split())
_NAMES: Final = frozenset(_NAME_LIST.split())
_NUMBER: Final = re.compile(r"[\d.,٫' ]*\d")
_WHOLE: Final = re.compile(r"\s?[.,:]\s?-{1,2}")
_GROUPS: Final = re.compile(r"[1-9]\d{0,2}(?:([.,' ])\d{3})(?:\1\d{3})*|[1-9]\d?(?:([.,' ])\d{2})(?:\2\d{2})*\2\d{3}")


@dataclass(frozen=True, slots=True)
class Amount:
    """A parsed price. `decimal` is the decimal separator; None if the text does not show one.

    An ambiguous price such as `1,299` is `value` (1299) if `sign` groups digits, `fraction` (1.299) if it is decimal.
    `currency` is the name or symbol as written, or "".
    """

    value: float
    decimal: str | None = None
    fraction: float | None = None
    sign: str = ""
    currency: str = ""

    def under(self, decimal: str | None) -> float | None:
        """Return the price as a number if its column's decimal separator is `decimal`; None if still ambiguous."""
        if self.fraction is None:
            return self.value
        if decimal is None:
            return None
        return self.fraction if self.sign == decimal else self.value


def read(text: str) -> Amount:
    """Return the price in `text`, with the currency that is written before or after the number, if any.

    Raises:
        ValueError: `text` is not a price.
    """
    plain = "".join(_plain(char) for char in text).translate(_SAME).strip()
    number = next((match for match in _NUMBER.finditer(plain) if any(map(str.isdigit, match.group()))), None)
    if number is None:
        raise ValueError("it has no digits")
    before, digits, after = plain[: number.start()], number.group(), plain[number.end() :]
    before, digits = _parted(before, digits)
    whole = _WHOLE.match(after)
    if whole is not None:
        after = after[whole.end() :]
    for name in (before, after):
        if not _is_currency(name):
            raise ValueError(f"{name.strip()!r} is not a currency; write it as 1234.50")
    currency = before.strip(" '") or after.strip(" '")
    return replace(_amount(digits, whole is not None), currency=currency)


def decimal_sign(texts: Iterable[str]) -> str | None:
    """Return the decimal separator ("." or ",") that a column's prices show; None if they show neither or both."""
    signs = set()
    for text in texts:
        try:
            signs.add(read(text).decimal)
        except ValueError:
            continue
        if {",", "."} <= signs:
            return None
    return next(iter(signs - {None}), None)


def _plain(char: str) -> str:
    """Return a digit of any script as ASCII, and "" for invisible characters."""
    if char.isascii():
        return char if char not in "\t\r\n" else " "
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    return "" if unicodedata.category(char) == "Cf" else char


def _parted(before: str, digits: str) -> tuple[str, str]:
    """Return the currency with the dot of its abbreviation ("Rs. 5", "kr.5", "S/.5"), and the number without it."""
    number = digits.lstrip(".,٫' ")
    lead = digits[: len(digits) - len(number)]
    if lead[:1] in (".", ",") and (before[-1:].isalpha() or f"{before}.".strip().casefold() in _NAMES):
        if len(lead) == 1 and number.isdigit() and before.split()[-1].upper() in _CODES:
            raise ValueError(f"it is ambiguous: {number} or 0.{number}; write one of these")
        before, lead = before + lead[0], lead[1:]
    # Behind a symbol, or a space, it is the decimal sign: $.99
    sign = lead.lstrip(" '")
    if len(sign) > 1:
        raise ValueError("its thousands separators are misplaced; write it as 1234.50")
    return before, sign + number


def _is_currency(text: str) -> bool:
    """True for "" and for symbols (also with a country's letters before), codes and names of currencies."""
    word = text.strip(" '").casefold()
    if not word or word.upper() in _CODES or word in _NAMES:
        return True
    symbols = [at for at, char in enumerate(word) if unicodedata.category(char) == "Sc"]
    if len(symbols) == 1 and len(word) <= 8:
        letters, rest = word[: symbols[0]].strip(), word[symbols[0] + 1 :].strip(" .")
        return (not letters or (letters.isalpha() and len(letters) <= 3)) and (not rest or rest.upper() in _CODES)
    parts = word.split()
    return len(parts) == 2 and word != text and all(part.upper() in _CODES or part in _NAMES for part in parts)


def _amount(digits: str, whole: bool) -> Amount:
    """Return the amount of `digits`; `whole` means that a dash replaced the fraction ("12,-")."""
    digits = digits.replace("\u066b", ",") if "\u066b" in digits and "," not in digits else digits
    if digits.isdigit():
        return Amount(float(digits))
    signs = [char for char in digits if not char.isdigit()]
    last = signs[-1]
    head, _, tail = digits.rpartition(last)
    grouped = _GROUPS.fullmatch(digits)
    if whole or (grouped is not None and (last in "' " or len(signs) > 1)):
        if grouped is None:
            raise ValueError("its thousands separators are misplaced; write it as 1234.50")
        other = {",": ".", ".": ","}.get(last)
        return Amount(float(_joined(digits)), decimal=other)
    if last in "' ":
        raise ValueError("its thousands separators are misplaced; write it as 1234.50")
    if head and not head.isdigit():
        heading = _GROUPS.fullmatch(head)
        if heading is None or last in head:
            raise ValueError("its thousands separators are misplaced; write it as 1234.50")
    value = float(f"{_joined(head) or '0'}.{tail}")
    if grouped is not None:
        return Amount(float(_joined(digits)), fraction=value, sign=last)
    return Amount(value, decimal=last)


def _joined(digits: str) -> str:
    return "".join(filter(str.isdigit, digits))
