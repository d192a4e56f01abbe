"""Opens PDFs and renders their pages, each in a child process of its own (`render_pages`)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qvl.errors import MediaError, MissingDependencyError
from qvl.media import render_pages
from qvl.media.document import Document
from qvl.media.document_head import HEAD, is_document
from qvl.media.image_header import check_size, kind_of
from qvl.media.page_choice import ALL_PAGES, PageChoice
from qvl.media.picture import LazyPixels, _deferred
from qvl.media.policy import canonical_size

if TYPE_CHECKING:
    from PIL import Image

    from qvl.media.policy import MediaPolicy

UNREADABLE: Final = "document_unreadable"
ENCRYPTED: Final = "document_encrypted"
TOO_LARGE: Final = "document_too_large"
_END: Final = b"%%EOF"
_LINEARIZED: Final = re.compile(rb"/Linearized\b.{0,400}?/L\s+(\d{1,12})", re.DOTALL)
_POINTS: Final = 72
# A busy machine gives a process a part of its time; this bounds one that waits without working.
_WAITING: Final = 6
_SIGNALS_OF_TIME: Final = frozenset({getattr(signal, "SIGXCPU", 0), getattr(signal, "SIGKILL", 0)})
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "DYLD_LIBRARY_PATH")


def read_document(data: bytes, name: str, policy: MediaPolicy, pages: PageChoice = ALL_PAGES) -> Document:
    """Return the document of encoded `data` with the chosen pages, which are rendered on first use.

    Raises:
        MediaError: it is no PDF, encrypted, cut short or broken, has no such page, or breaks a limit.
        MissingDependencyError: pypdfium2 is not installed.
    """
    _check_whole(data, name)
    most = policy.max_pages
    answer, _ = _asked(data, name, policy, {"spans": pages.spans or ((1, None),), "most": most})
    count = int(answer["count"])
    if count < 1:
        raise _broken(name, "it has no pages")
    chosen = list(chain(*(span[: most + 1] for span in pages.of(count, name))))
    if len(chosen) > most:
        what = f"{name} has {count} pages, and more than the limit of {most} are asked for"
        raise MediaError(what, hint=f'name some: pages="1-{most}", or read it page by page: qvl read', code=TOO_LARGE)
    digest = hashlib.sha256(data).hexdigest()
    sizes = {int(number): (float(width), float(height)) for number, width, height in answer["sizes"]}
    whole = object()
    shown = []
    for number in chosen:
        page = f"{name}#page={number}"
        original = _pixels_at(sizes[number], policy.document_dpi)
        check_size(original, policy, page)
        width, height, sized = canonical_size(*original, policy)
        lazy = LazyPixels(decode=_Renderer(data, page, policy, number, (width, height)), whole=whole)
        # By what it is rendered from; pages of two sizes differ in the budget, which is in the key beside the hash.
        of_page = f"{digest}/page {number}/{policy.document_dpi:g} dpi"
        sha256 = "sha256:" + hashlib.sha256(of_page.encode()).hexdigest()
        shown.append(_deferred(sha256, (width, height), page, lazy, original, untouched=False, sized=sized))
    return Document(f"sha256:{digest}", tuple(shown), tuple(chosen), count, name)


def _pixels_at(points: tuple[float, float], dpi: float) -> tuple[int, int]:
    # A page without any extent would be no picture.
    width, height = (max(1, round(side * dpi / _POINTS)) for side in points)
    return width, height


class _Renderer:
    """Renders one page in `size` pixels (width, height) when it is called."""

    def __init__(self, data: bytes, name: str, policy: MediaPolicy, number: int, size: tuple[int, int]) -> None:
        self._data, self._name, self._policy = data, name, policy
        self._number, self._size = number, size

    def __call__(self) -> Image.Image:
        from PIL import Image

        width, height = self._size
        task = {"page": self._number, "width": width, "height": height}
        answer, pixels = _asked(self._data, self._name, self._policy, task)
        stride = int(answer["stride"])
        if len(pixels) < stride * height:
            raise _broken(self._name, "its pixels did not arrive")
        return Image.frombuffer("RGB", self._size, pixels, "raw", "RGB", stride, 1)


def _check_whole(data: bytes, name: str) -> None:
    """Raise MediaError for data that is no PDF, or one that is cut short, of which PDFium shows what is there."""
    if not data:
        raise MediaError(f"{name} is empty", hint="0 bytes; save or download it again", code=UNREADABLE)
    if not is_document(data[:HEAD]):
        what = kind_of(data).partition(";")[0]
        raise MediaError(f"{name} is not a PDF: it starts like {what}", hint="pass a PDF or a picture", code=UNREADABLE)
    linearized = _LINEARIZED.search(data[:HEAD])
    if linearized is not None and len(data) < int(linearized[1]):
        raise _cut(name, f"{len(data)} of {int(linearized[1])} bytes")
    end = data.rfind(_END)
    if end < 0 or b" obj" in data[end:]:
        raise _cut(name, "its end mark is missing")


def _cut(name: str, why: str) -> MediaError:
    return MediaError(f"{name} is cut short: {why}", hint="save or download it again", code=UNREADABLE)


def _broken(name: str, why: str) -> MediaError:
    hint = "open it in a viewer and save it again"
    return MediaError(f"{name}: the PDF is broken: {why}", hint=hint, code=UNREADABLE)


def _asked(data: bytes, name: str, policy: MediaPolicy, task: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return what the child process answers: its line of JSON, and the bytes behind it.

    Raises:
        MediaError: the document is encrypted or broken, or takes too much time or memory.
        MissingDependencyError: pypdfium2 is not installed.
    """
    seconds = policy.max_document_seconds
    task = {**task, "library": _library(), "seconds": seconds}
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    command = [sys.executable, "-I", "-S", render_pages.__file__, json.dumps(task)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and file
            command, input=data, capture_output=True, timeout=_WAITING * seconds + 30, env=environment, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise _too_slow(name, seconds) from exc
    except OSError as exc:
        raise MediaError(f"{name}: no process for it can be started: {exc.strerror}", hint="see the limits") from exc
    line, _, rest = done.stdout.partition(b"\n")
    if -done.returncode in _SIGNALS_OF_TIME:
        raise _too_slow(name, seconds)
    if not line:
        words = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        if "MemoryError" in words or "Failed to create" in words:
            raise MediaError(f"{name} takes too much memory", hint="export its pages as pictures", code=TOO_LARGE)
        raise _broken(name, words[:120] or f"PDFium ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(line)
    if answer.get("fault") == "encrypted":
        hint = "save it without a password first, as with: qpdf --decrypt --password=… in.pdf out.pdf"
        raise MediaError(f"{name} is encrypted: {answer['words']}", hint=hint, code=ENCRYPTED)
    if "fault" in answer:
        raise _broken(name, str(answer["words"])[:120])
    return answer, rest


def _too_slow(name: str, seconds: float) -> MediaError:
    return MediaError(
        f"{name} takes more than {seconds:g} s of processor time",
        hint="export the page as a picture, or raise MediaPolicy.max_document_seconds",
        code=TOO_LARGE,
    )


def _library() -> str:
    """Return the folder that pypdfium2 is installed in."""
    found = importlib.util.find_spec("pypdfium2")
    if found is None or found.origin is None:
        raise MissingDependencyError("PDF documents need pypdfium2", hint="pip install 'qvl[documents]'")
    return str(Path(found.origin).parents[1])
