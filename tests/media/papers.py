"""Small PDF documents, written by hand, with a drawn product on each page."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence

from qvl.tiny.render import DrawnProduct, draw

MUG = DrawnProduct("NORVIK", "mug", "blue", 1)
BAG = DrawnProduct("FYLDEN", "bag", "pink", 2)
SHOE = DrawnProduct("ACORN", "shoe", "red", 1)


def paper(
    pages: Sequence[DrawnProduct | str], *, box: tuple[int, int] = (320, 240), turned: int = 0, extra: str = ""
) -> bytes:
    """Return a PDF of a page of `box` points for each of `pages`: a drawn product that fills it, or a line of text."""
    first = 4
    kids = " ".join(f"{first + 3 * index} 0 R" for index in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, page in enumerate(pages):
        number = first + 3 * index
        resources = f"<< /Font << /F1 3 0 R >> /XObject << /P {number + 2} 0 R >> >>"
        places = f"/MediaBox [0 0 {box[0]} {box[1]}] /Rotate {turned} {extra}"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R {places} /Contents {number + 1} 0 R /Resources {resources} >>".encode()
        )
        if isinstance(page, str):
            objects += [_stream(f"BT /F1 24 Tf 20 {box[1] // 2} Td ({page}) Tj ET".encode()), b"null"]
        else:
            image = draw(page, 3, (320, 240)).convert("RGB").resize((160, 120))
            look = f"/Type /XObject /Subtype /Image /Width {image.width} /Height {image.height}"
            look += " /ColorSpace /DeviceRGB /BitsPerComponent 8 /Filter /FlateDecode"
            shown = _stream(zlib.compress(image.tobytes(), 0), look)
            objects += [_stream(f"{box[0]} 0 0 {box[1]} 0 0 cm /P Do".encode()), shown]
    return written(objects)


def written(objects: Sequence[bytes], trailer: str = "") -> bytes:
    """Return the file of these objects, the first of which is the catalogue."""
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    starts = []
    for number, content in enumerate(objects, 1):
        starts.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    table = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    for start in starts:
        out.write(b"%010d 00000 n \n" % start)
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{table}\n%%EOF\n"
    out.write(end.encode())
    return out.getvalue()


def _stream(data: bytes, fields: str = "") -> bytes:
    return b"<< %s /Length %d >>\nstream\n%s\nendstream" % (fields.encode(), len(data), data)


def locked() -> bytes:
    """Return a PDF that opens with a password alone (RC4, revision 2; the user's password is not empty)."""
    key = "(" + "\\101" * 32 + ")"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 320 240] >>",
        f"<< /Filter /Standard /V 1 /R 2 /O {key} /U {key} /P -4 >>".encode(),
    ]
    return written(objects, "/Encrypt 4 0 R /ID [<00> <00>]")
