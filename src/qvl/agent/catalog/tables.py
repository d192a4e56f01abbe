"""Reader of CSV files with detection of the encoding and recovery from wrong quotation, row by row."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from qvl.agent.catalog.product import Problem
from qvl.errors import ConfigError
from qvl.log import logger

DELIMITERS: Final = ",;\t|"
_CHUNK: Final = 1 << 20
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATOR_LINE: Final = re.compile(r'\s*"?sep=(.)"?\s*', re.IGNORECASE)
_LONG_RUN: Final = re.compile(rb"[\x80-\xff]{4,}")
_QUOTE: Final = "has an unclosed or misplaced quotation mark"
_SHAPES: Final = 100
_ANY: Final = re.compile(".")
_NUMBERED: Final = re.compile(r".*\d")
_CODE: Final = re.compile(r"(?=.*\d)(?=.*[^\W\d])\S+$")
log = logger("qvl.agent")


def open_text(path: Path) -> IO[str]:
    """Return `path` opened as text, with line ends unchanged.

    The encoding is that of the byte order mark, else UTF-8, else GB 18030 or Windows-1252 if the text looks like it.

    Raises:
        ConfigError: the encoding is unknown; the error names the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None) or _wide(head)
        if encoding is None:
            file.seek(0)
            encoding = "utf-8" if _is_utf8(file) else _older(path)
    try:
        if encoding != "utf-8":
            with path.open(encoding=encoding, newline="") as text:
                while text.read(_CHUNK):
                    pass
    except UnicodeError as exc:
        raise ConfigError(f"{path.name} is not valid {encoding.upper()}: {exc}", hint="save it as UTF-8") from exc
    return path.open(encoding=encoding, newline="")


def _wide(head: bytes) -> str | None:
    """Return the encoding of UTF-16 without a byte order mark (every other byte of ASCII is zero), or None."""
    half = len(head) // 2
    if half < 4:
        return None
    if head[1::2].count(0) > half * 0.7:
        return "utf-16-le"
    return "utf-16-be" if head[0::2].count(0) > half * 0.7 else None


def _is_utf8(file: IO[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _older(path: Path) -> str:
    data = path.read_bytes()
    encoding = "gb18030" if _is_chinese(data) else "cp1252" if _is_western(data) else None
    if encoding is None:
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            before = data[: exc.start]
            line = before.count(b"\n") + before.replace(b"\r\n", b"").count(b"\r") + 1
            raise ConfigError(
                f"{path.name} is not UTF-8 (line {line}), and its encoding is unknown", hint="save it as UTF-8"
            ) from exc
    assert encoding is not None
    log.warning("catalogue is not UTF-8", file=path.name, read_as=encoding)
    return encoding


def _is_chinese(data: bytes) -> bool:
    """True if nearly all non-ASCII characters, decoded as GB 18030, are common; other encodings give rare ones."""
    try:
        beyond = [char for char in data.decode("gb18030") if not char.isascii()]
    except UnicodeDecodeError:
        return False
    common = 0
    for char in beyond:
        pair = char.encode("gb2312", "ignore")
        # Punctuation and symbols, and the characters of the first level.
        common += bool(pair) and (pair[0] <= 0xA3 or 0xB0 <= pair[0] <= 0xD7)
    return common >= 0.8 * len(beyond)


def _is_western(data: bytes) -> bool:
    """True if non-ASCII bytes occur in runs of at most three, like accented letters; other scripts have longer runs."""
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    if b"\xff" in data:  # no word of these languages needs it, while broken files are full of it
        return False
    beyond = sum(byte > 0x7F for byte in data)
    return sum(map(len, _LONG_RUN.findall(data))) < 0.2 * beyond


def csv_rows(file: IO[str], kind: str) -> Iterator[tuple[int, dict[str, str] | Problem]]:
    """Yield (line, row) for every row: its cells by column name, or its problem. `kind` is ".csv" or ".tsv".

    After a wrongly quoted row, reading continues with the next line.
    """
    lines = _Lines(file)
    delimiter, names, problem = _head(lines, "\t" if kind == ".tsv" else None)
    if problem is not None:
        yield problem.line, problem
    ids = _Ids(delimiter, names)
    while (line := lines.peek()) is not None:
        number, text = line
        if not text.strip():
            lines.take()
            continue
        taken, cells, wrong = _record(lines, delimiter)
        inner: list[int] = []
        if wrong is None and len(taken) > 1 and len(names) > 1:
            inner, certain = ids.swallowed(taken)
            wrong = _QUOTE if certain else None
        if wrong is not None:
            lines.put_back(taken[1:])
            yield number, Problem(number, wrong)
            continue
        if inner:
            end = taken[-1][0]
            yield (number, Problem(number, f"the row has a quoted text up to line {end}, whose lines look like rows"))
            for at in inner:
                yield at, Problem(at, f"the line looks like a row, but is in the quotation marks of line {number}")
            continue
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) > len(names):
            yield number, Problem(number, f"the row has {len(cells)} cells, expected {len(names)}")
        elif any(cell.strip() for cell in cells):
            ids.add(cells)
            yield number, dict(zip(names, cells, strict=False))


class _Lines:
    """An iterator over (number, line) of a file, to which lines can be put back."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._number = 0
        self._again: deque[tuple[int, str]] = deque()

    def take(self) -> tuple[int, str] | None:
        if self._again:
            return self._again.popleft()
        text = self._file.readline()
        if not text:
            return None
        self._number += 1
        return self._number, text.replace("\0", "")

    def peek(self) -> tuple[int, str] | None:
        line = self.take()
        if line is not None:
            self._again.appendleft(line)
        return line

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        self._again.extendleft(reversed(lines))


def _head(lines: _Lines, delimiter: str | None) -> tuple[str, list[str], Problem | None]:
    """Return (delimiter, column names, problem of the header or None), skipping blank lines and `sep=;`."""
    while (line := lines.peek()) is not None:
        _, text = line
        named = _SEPARATOR_LINE.fullmatch(text.strip("\ufeff\r\n"))
        if named is not None:
            delimiter = named.group(1)
        elif text.strip("\ufeff \t\r\n" + DELIMITERS):
            break
        lines.take()
    if line is None:
        return ",", [], None
    number, text = line
    lines.take()
    lines.put_back([(number, text.lstrip("\ufeff"))])
    candidates: list[tuple[tuple[bool, int], str, list[str], int, Problem | None]] = []
    for sign in [delimiter] if delimiter is not None and delimiter in text else DELIMITERS:
        taken, cells, wrong = _record(lines, sign)
        lines.put_back(taken)
        if wrong is not None or _rows_in(taken[1:], sign, len(cells)):
            taken, cells, wrong = taken[:1], [cell.strip('" ') for cell in _cells(text, sign)], _QUOTE
        names = [cell.strip() for cell in cells]
        known = {"id", "name"} <= {name.casefold() for name in names}
        problem = None if wrong is None else Problem(number, f"the header {wrong}")
        candidates.append(((known, len(names)), sign, names, len(taken), problem))
    _, sign, names, size, problem = max(candidates, key=lambda candidate: candidate[0])
    for _ in range(size):
        lines.take()
    return sign, names, problem


def _record(lines: _Lines, delimiter: str) -> tuple[list[tuple[int, str]], list[str], str | None]:
    """Return (lines, cells, fault or None) of the next row."""
    taken: list[tuple[int, str]] = []

    def feed() -> Iterator[str]:
        while (line := lines.take()) is not None:
            taken.append(line)
            yield line[1]

    try:
        return taken, next(csv.reader(feed(), delimiter=delimiter, strict=True, skipinitialspace=True), []), None
    except csv.Error as exc:
        return taken, [], f"has a cell with too many characters ({exc})" if "limit" in str(exc) else _QUOTE


class _Ids:
    """The shapes of a file's ids, by which rows are distinguished from lines inside a quoted text."""

    def __init__(self, delimiter: str, names: list[str]) -> None:
        self._delimiter = delimiter
        self._size = len(names)
        self._at = next((at for at, name in enumerate(names) if name.casefold() == "id"), 0)
        self._shapes: set[str] = set()

    def add(self, cells: list[str]) -> None:
        if self._at < len(cells) and len(self._shapes) < _SHAPES:
            self._shapes.add(_shape(cells[self._at]))

    def swallowed(self, taken: list[tuple[int, str]]) -> tuple[list[int], bool]:
        """Return the numbers of the lines after `taken[0]` that look like rows, and True if they certainly are rows.

        They certainly are if each of these lines has an id with a digit; an id without a digit could be any word.
        """
        first = _cells(taken[0][1], self._delimiter)
        spaced = _spaced(first)
        shapes = self._shapes | ({_shape(first[self._at])} if self._at < len(first) else set())
        rows, certain = [], True
        for number, text in taken[1:]:
            cells = _cells(text, self._delimiter)
            if not any(cell.strip() for cell in cells):
                continue
            # `10,5 cm` and `2,000 pieces` are numbers of a text, unless there are as many cells as the head has.
            behind = cells[self._at + 1] if self._at + 1 < len(cells) else ""
            number_like = self._delimiter == "," and behind[:1].isdigit()
            least = max(self._size, 3) if number_like else 2
            fits = least <= len(cells) <= self._size and self._at < len(cells) and _spaced(cells) <= spaced
            shape = _shape(cells[self._at]) if fits else ""
            if shape and shape in shapes:
                rows.append(number)
                certain = certain and "0" in shape and not number_like
            else:
                certain = False
        if not rows:
            return _rows_in(taken[1:], self._delimiter, self._size, self._at), False
        return rows, certain


def _cells(text: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE), [])


def _rows_in(lines: list[tuple[int, str]], delimiter: str, size: int, id_column: int = 0) -> list[int]:
    """Return the numbers of `lines` if all of them look like rows: each has `size` cells.

    A single line also needs an id with a digit, and rows of two cells need ids of letters and digits, since prose has
    commas too. The text before the closing quotation mark may be empty.
    """
    rows = [(number, _cells(text, delimiter)) for number, text in lines if text.strip()]
    if rows and rows[-1][1][0].strip().startswith('"'):
        rows.pop()
    if not all(len(cells) == size > max(1, id_column) and not _spaced(cells) for _, cells in rows):
        return []
    ids = [cells[id_column].strip(' "\r\n') for _, cells in rows]
    form = _CODE if size == 2 else _NUMBERED if len(ids) == 1 else _ANY
    return [number for number, _ in rows] if all(map(form.match, ids)) else []


def _shape(identity: str) -> str:
    """Return the shape of an id: `a-0` for both `SKU-12` and `sku-7`."""
    text = identity.strip(' "\r\n').casefold()
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", text))


def _spaced(cells: list[str]) -> bool:
    """True if a space follows each delimiter, as in a sentence."""
    return len(cells) > 1 and all(cell.startswith(" ") for cell in cells[1:])
