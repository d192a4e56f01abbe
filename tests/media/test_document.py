"""Documents pass the gate: pages as they look, chosen by their numbers, and a clear line for what cannot be opened."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageChops
from tests.media.papers import BAG, MUG, SHOE, locked, paper, written

from qvl.errors import ConfigError, MediaError
from qvl.media import gate
from qvl.media.document_head import is_document, looks_like_document
from qvl.media.load_document import load_document
from qvl.media.page_choice import PageChoice, apart, read_pages
from qvl.media.policy import MediaPolicy
from qvl.tiny.render import draw


def refusal(source: object, **limits: object) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_document(source, MediaPolicy(**limits))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value


def test_pages_look_as_they_were_drawn() -> None:
    document = load_document(paper([MUG, BAG]), MediaPolicy(document_dpi=72))
    assert (document.count, document.numbers) == (2, (1, 2))
    for page, product in zip(document.pages, (MUG, BAG), strict=True):
        assert page.original == (320, 240)
        difference = ImageChops.difference(page.rgb(), draw(product, 3, (320, 240)).convert("RGB"))
        assert np.asarray(difference).mean() < 8
    assert [page.source for page in document.pages] == ["<bytes>#page=1", "<bytes>#page=2"]


def test_the_resolution_is_the_policys_and_the_budget_holds() -> None:
    (page,) = load_document(paper([MUG]), MediaPolicy(document_dpi=144)).pages
    assert page.original == (page.width, page.height) == (640, 480)
    (small,) = load_document(paper([MUG]), MediaPolicy(document_dpi=144, max_pixels=80_000)).pages
    assert small.original == (640, 480)
    assert small.rgb().size == (small.width, small.height)
    assert small.width * small.height <= 80_000
    (turned,) = load_document(paper([MUG], turned=90), MediaPolicy(document_dpi=72)).pages
    assert turned.rgb().size == (240, 320)


def test_hashes_are_those_of_pages_without_rendering_them() -> None:
    data = paper([MUG, MUG])
    first, second = (page.sha256 for page in load_document(data).pages)
    assert first != second
    assert load_document(data, pages=read_pages(2)).pages[0].sha256 == second
    assert load_document(data, MediaPolicy(document_dpi=100)).pages[0].sha256 != first
    assert load_document(paper([MUG, BAG])).pages[0].sha256 != first


@pytest.mark.parametrize(
    ("pages", "numbers"),
    [(2, [2]), ("2", [2]), ("1-3", [1, 2, 3]), (" 3 , 1 - 2 ", [3, 1, 2]), ("2-", [2, 3, 4]), ([4, 1], [4, 1])],
)
def test_pages_are_chosen(pages: object, numbers: list[int]) -> None:
    document = load_document(paper(["a", "b", "c", "d"]), pages=read_pages(pages))
    assert list(document.numbers) == numbers


@pytest.mark.parametrize(
    "pages", ["x", "", "0", "0-2", "3-1", "-2", "1,,2", "1;2", 0, -1, 1.5, True, [], ["1"], b"1", "\u0663"]
)
def test_what_names_no_pages_is_refused(pages: object) -> None:
    with pytest.raises(ConfigError, match="names no pages") as caught:
        read_pages(pages)
    assert caught.value.param == "pages"


def test_a_name_chooses_pages(tmp_path: Path) -> None:
    path = tmp_path / "bill.pdf"
    path.write_bytes(paper(["a", "b", "c"]))
    assert load_document(f"{path}#page=2").numbers == (2,)
    assert load_document(Path(f"{path}#pages=2-3&zoom=80")).numbers == (2, 3)
    assert load_document(path.as_uri() + "#page=3").numbers == (3,)
    assert apart("https://example.org/a.pdf?x=1#page=7") == ("https://example.org/a.pdf?x=1", PageChoice(((7, 7),)))
    assert apart("notes#1.pdf") == ("notes#1.pdf", None)
    odd = tmp_path / "a#page=2"
    odd.write_bytes(paper(["a"]))
    assert load_document(odd).numbers == (1,), "a file of that very name is that file"
    with pytest.raises(MediaError, match="#page='x' names no pages"):
        load_document(f"{path}#page=x")


def test_pages_that_are_not_there_and_too_many() -> None:
    error = refusal(paper(["a"] * 3), max_pages=2)
    assert "has 3 pages, and more than the limit of 2" in error.message
    assert error.code == "document_too_large"
    with pytest.raises(MediaError, match="has 1 page, so there is no page 2"):
        load_document(paper(["a"]), pages=read_pages("1-2"))
    many = paper(["a"] * 1_000)
    assert load_document(many, pages=read_pages("999-")).numbers == (999, 1000)
    with pytest.raises(MediaError, match="has 1000 pages"):
        load_document(many, pages=read_pages("1-999999999"))


def test_what_cannot_be_opened_is_told_apart(tmp_path: Path) -> None:
    whole = paper([MUG, BAG])
    assert refusal(locked()).code == "document_encrypted"
    assert "needs a password" in refusal(locked()).message
    for length in (len(whole) // 2, len(whole) - 20, 2_000):
        assert "is cut short" in refusal(whole[:length]).message
    grown = whole + b"9 0 obj\n<< /Type /Catalog /Pages 2 0 R"
    assert "is cut short" in refusal(grown).message
    assert "is broken" in refusal(b"%PDF-1.4\nnothing of it\n%%EOF").message
    empty = written([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"])
    assert "it has no pages" in refusal(empty).message
    named = tmp_path / "page.pdf"
    named.write_bytes(b"<!doctype html><title>Sign in</title>")
    assert "page.pdf is not a PDF: it starts like a web page" in refusal(named).message
    assert "is empty" in refusal(b"").message
    assert "no such file" in refusal(tmp_path / "none.pdf").message
    assert refusal(whole, max_bytes=1_000).code == "document_too_large"


def test_a_linearized_file_that_is_cut_short_is_known_by_its_length() -> None:
    whole = paper(["a"]).replace(b"/Type /Catalog", b"/Linearized 1 /L 99999 /Type /Catalog", 1)
    assert "of 99999 bytes" in refusal(whole).message


def test_pages_beyond_the_limits_of_a_picture() -> None:
    assert "more than the limit" in refusal(paper(["a"], box=(14_400, 14_400))).message
    assert "aspect ratio" in refusal(paper(["a"], box=(10_000, 10))).message
    # A box without any extent is what PDFium takes for a letter.
    assert load_document(paper(["a"], box=(0, 0))).pages[0].width > 100


@pytest.mark.slow
def test_work_without_end_ends_at_the_limit_of_time() -> None:
    loop = b" ".join([b"0 0 320 240 re 10 10 300 220 re f"] * 400_000)
    packed = zlib.compress(loop)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 2000 2000] /Contents 4 0 R >>",
        b"<< /Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (len(packed), packed),
    ]
    (page,) = load_document(written(objects), MediaPolicy(max_document_seconds=1)).pages
    with pytest.raises(MediaError, match=r"#page=1 takes more than 1 s of processor time"):
        page.rgb()


def test_the_first_bytes_tell_a_document() -> None:
    assert is_document(b"%PDF-1.7")
    assert is_document(b"\r\nX-Header: of a printer\r\n%PDF-1.4")
    assert not is_document(b"\x89PNG\r\n\x1a\n with %PDF-1.4 in a comment")
    assert looks_like_document("data:application/octet-stream;base64,JVBERi0xLjQK")
    assert not looks_like_document("https://example.org/a.pdf"), "a URL tells when it is fetched"


def test_the_gate_of_pictures_names_the_way() -> None:
    with pytest.raises(MediaError, match="a PDF document; its pages are pictures"):
        gate.load(paper([SHOE]))
