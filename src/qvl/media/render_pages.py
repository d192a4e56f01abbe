"""The child process that opens a PDF: tells its pages' sizes, or renders one page. It imports nothing of qvl.

PDFium parses files of strangers in C++, cannot be interrupted and takes a lock of its own; here it can crash, hang or
fill its memory without taking anything with it. Run as `python render_pages.py JSON`, the PDF on stdin: the answer is
a line of JSON, behind which the pixels of a page follow as RGB rows.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_FAULTS = {
    0: ("broken", "it has no pages, or none that can be found"),
    4: ("encrypted", "needs a password"),
    5: ("encrypted", "in a way that PDFium does not know"),
}
# What a file of 64 MiB, its decoded pictures and one rendered page need, with room.
_MEMORY = 2**30


def main(task: dict[str, Any]) -> None:
    sys.path.append(task["library"])
    _limit(task["seconds"])
    data = sys.stdin.buffer.read()
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as exc:
        fault, words = _FAULTS.get(exc.err_code or 0, ("broken", "its structure cannot be read"))
        _tell({"fault": fault, "words": words})
        return
    if "page" in task:
        _render(document, task["page"], task["width"], task["height"])
        return
    count = len(document)
    sizes: list[tuple[int, float, float]] = []
    for first, last in task["spans"]:
        for number in range(first, min(count, last or count) + 1):
            if len(sizes) > task["most"]:
                break
            sizes.append((number, *document.get_page_size(number - 1)))
    _tell({"count": count, "sizes": sizes})


def _render(document: Any, number: int, width: int, height: int) -> None:
    import pypdfium2
    from pypdfium2 import raw

    document.init_forms()
    try:
        page = document[number - 1]
        bitmap = pypdfium2.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR, rev_byteorder=True)
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        where = (bitmap, page, 0, 0, width, height, 0, raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER)
        raw.FPDF_RenderPageBitmap(*where)
        if document.formenv:
            raw.FPDF_FFLDraw(document.formenv, *where)
    except pypdfium2.PdfiumError as exc:
        _tell({"fault": "broken", "words": f"the page cannot be read: {exc}"})
        return
    _tell({"stride": bitmap.stride})
    sys.stdout.buffer.write(bitmap.buffer)
    sys.stdout.buffer.flush()


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit(seconds: float) -> None:
    try:
        import resource
    except ImportError:  # Windows; the parent's own limit of time holds there
        return
    most = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
