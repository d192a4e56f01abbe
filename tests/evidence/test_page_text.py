"""Pages as models write them: boxes in thousandths, elements in their order, nothing that a browser would run."""

from __future__ import annotations

import pytest

from qvl.evidence.coordinates import Frame
from qvl.evidence.page_text import PageElement, read_page

PAGE = Frame(0, 2000, 1000, 1000, 1000, relative=True)
RESIZED = Frame(0, 2000, 1000, 500, 250, relative=False)


def places(elements: tuple[PageElement, ...]) -> list[tuple[object, ...]]:
    return [(e.kind, e.text, e.box.x1, e.box.y1, e.box.x2, e.box.y2) for e in elements]


def test_html_of_qwens_form() -> None:
    answer = (
        '```html\n<html><body>\n<h2 data-bbox="100 50 500 90">Invoice</h2>\n'
        '<div class="image" data-bbox="600 50 900 300"><img data-bbox="600 50 900 300"/></div>\n'
        '<table data-bbox="100 400 900 800"><tr><td colspan="2">A &amp; B</td></tr></table>\n</body></html>\n```'
    )
    text, elements = read_page(answer, "html", PAGE)
    assert text == (
        '<h2 data-bbox="100 50 500 90">Invoice</h2>\n'
        '<div class="image" data-bbox="600 50 900 300"><img data-bbox="600 50 900 300"></div>\n'
        '<table data-bbox="100 400 900 800"><tr><td colspan="2">A &amp; B</td></tr></table>\n'
    )
    assert places(elements) == [
        ("h2", "Invoice", 200, 50, 1000, 90),
        ("image", "", 1200, 50, 1800, 300),
        ("image", "", 1200, 50, 1800, 300),
        ("table", "A & B", 200, 400, 1800, 800),
    ]


def test_pixels_of_older_models_become_thousandths() -> None:
    text, elements = read_page('<p data-bbox="50 25 250 125">a</p>', "html", RESIZED)
    assert text == '<p data-bbox="100 100 500 500">a</p>\n'
    assert places(elements) == [("p", "a", 200, 100, 1000, 500)]
    text, elements = read_page("# A\n<!-- Image (50, 25, 250, 125) -->\nb", "markdown", RESIZED)
    assert text == "# A\n<!-- Image (100, 100, 500, 500) -->\nb\n"
    assert places(elements) == [("image", "", 200, 100, 1000, 500)]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<p>a<script>alert(1)</script>b</p>", "<p>ab</p>\n"),
        ("<p onclick='x()' style='color:red' class='t'>a", '<p class="t">a</p>\n'),
        ('<a href="javascript:x()">a</a><a href="https://e.org/?a&b">b</a>', '<a>a</a><a href="https://e.org/?a&amp;b">b</a>\n'),
        ('<img src="http://t.example/x.png" alt="a">', '<img alt="a">\n'),
        ("<svg><script>x</script><p>in</p></svg><p>out</p>", "<p>out</p>\n"),
        ("</section><p>a</section></p>", "<p>a</p>\n"),
        ("<table><tr><td>cut off", "<table><tr><td>cut off</td></tr></table>\n"),
        ("<!-- c --><?php x ?><iframe src='x'></iframe>1 < 2", "1 &lt; 2\n"),
        ('<p data-bbox="1 2 3">a</p><p data-bbox="5 5 5 5">b</p><p data-bbox="x">c</p>', "<p>a</p><p>b</p><p>c</p>\n"),
        ("<b>" * 500 + "deep", "<b>" * 100 + "deep" + "</b>" * 100 + "\n"),
        ("", "\n"),
    ],
)  # fmt: skip
def test_only_what_is_harmless_is_kept(answer: str, text: str) -> None:
    assert read_page(answer, "html", PAGE) == (text, ())


def test_markdown_loses_its_fence_alone() -> None:
    inner = "# Title\n\n```python\nx = 1\n```\n\nend"
    assert read_page(f"```markdown\n{inner}\n```", "markdown", PAGE)[0] == inner + "\n"
    assert read_page(inner, "markdown", PAGE)[0] == inner + "\n"
    assert read_page("<!-- Table (1, 2, 1, 2) -->", "markdown", PAGE) == ("<!-- Table -->\n", ())
