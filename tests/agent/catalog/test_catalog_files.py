"""Catalogue files as shops export them: prices, encodings, delimiters, and rows that are quoted wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvl.agent import Catalog
from qvl.agent.catalog import read_file
from qvl.agent.catalog.parse_wish import read_wish
from qvl.agent.catalog.prices import Amount
from qvl.errors import ConfigError


def opened(tmp_path: Path, content: str | bytes, name: str = "shop.csv") -> Catalog:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Catalog(path, index=":memory:")


def contents(catalog: Catalog) -> tuple[dict[str, float | None], list[str]]:
    with catalog:
        return {item.id: item.price for item in catalog.all()}, [str(problem) for problem in catalog.problems]


def prices(tmp_path: Path, *texts: str) -> tuple[list[float | None], list[str]]:
    """The prices of a JSONL catalogue with one more row, so that it never is empty."""
    rows = [{"id": f"{number}", "name": "Mug", "price": text} for number, text in enumerate(texts)]
    lines = "\n".join(json.dumps(row) for row in [*rows, {"id": "last", "name": "Mug"}])
    found, problems = contents(opened(tmp_path, lines, "shop.jsonl"))
    return [price for name, price in found.items() if name != "last"], problems


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("9,99", 9.99),
        ("12,5", 12.5),
        (",50", 0.5),
        ("0,299", 0.299),
        ("19.9900", 19.99),
        ("1.299,00 €", 1299.0),
        ("$1,299.00", 1299.0),
        ("1.299.000", 1_299_000.0),
        ("₹1,23,456.78", 123456.78),
        ("Rs. 1,23,456", 123456.0),
        ("1 299,50 kr", 1299.5),
        ("1\u00a0299,50\u00a0zł", 1299.5),
        ("1\u202f299 €", 1299.0),
        ("CHF 1'299.00", 1299.0),
        ("1\u2019299.\u2013", 1299.0),
        ("1.299,-", 1299.0),
        ("12.-", 12.0),
        ("R$ 1.299,90", 1299.9),
        ("$9.99 USD", 9.99),
        ("￥９９．９０", 99.9),
        ("٩٫٩٩ ر.س", 9.99),
        ("١٬٢٩٩٫٥٠", 1299.5),
        ("\u200f12,50 €\u200f", 12.5),
        ("$.99", 0.99),
        ("$ .99", 0.99),
        ("US$.99", 0.99),
        ("£.5", 0.5),
        ("€,50", 0.5),
        ("Rs.5", 5),
        ("Rs. 5", 5),
        ("kr.5", 5),
        ("S/.5", 5),
        ("99 元", 99.0),
        ("10 000 руб.", 10000.0),
    ],
)
def test_prices_are_read_as_the_world_writes_them(tmp_path: Path, text: str, price: float) -> None:
    assert prices(tmp_path, text) == ([price], [])


@pytest.mark.parametrize(
    "text",
    [
        "from 9.99",
        "9€99",
        "2 for 5",
        "1,299.00.",
        "10.000.00",
        "EUR",
        "12%",
        "5k",
        "12 kg",
        "9-12",
        "-5",
        "\u22125",
        "(5)",
        "9.99-",
        "12 50",
        "1,29,9",
        "1,234,56",
        "12⁹⁹",
        "1e3",
    ],
)
def test_what_is_not_a_price_is_refused_by_its_line(tmp_path: Path, text: str) -> None:
    found, problems = prices(tmp_path, "9.99", text)
    assert found == [9.99]
    assert len(problems) == 1
    assert problems[0].startswith("line 2: price ")


@pytest.mark.parametrize(
    ("others", "read"),
    [
        (("12,50",), {"1,299": 1.299, "1.299": 1299.0}),
        (("12.50",), {"1,299": 1299.0, "1.299": 1.299}),
        (("1.299.000",), {"1,299": 1.299, "1.299": 1299.0}),
        (("1,23,456",), {"1,299": 1299.0, "1.299": 1.299}),
        (("99", "1 500"), {}),
        (("12,50", "12.50"), {}),
    ],
)
@pytest.mark.parametrize("text", ["1,299", "1.299"])
def test_an_ambiguous_price_follows_its_column_or_is_refused(
    tmp_path: Path, others: tuple[str, ...], read: dict[str, float], text: str
) -> None:
    found, problems = prices(tmp_path, text, *others)
    if text in read:
        assert (found[0], problems) == (read[text], [])
    else:
        assert len(found) == len(others)
        (problem,) = problems
        assert "line 1" in problem
        assert "ambiguous: 1299 or 1.299" in problem


@pytest.mark.parametrize("text", ["USD.99", "eur.5", "US USD.99", "GBP.99", "EUR,99"])
def test_a_point_behind_a_code_may_end_it_or_begin_a_fraction_and_is_refused(tmp_path: Path, text: str) -> None:
    found, (problem,) = prices(tmp_path, "USD. 99", "USD .99", text)
    assert found == [99.0, 0.99]
    assert problem.startswith(f"line 3: price '{text}' cannot be read: ")
    number = text[-2:].strip(".")
    assert problem.endswith(f"ambiguous: {number} or 0.{number}; write one of these")


def test_rows_that_are_given_follow_their_column_too() -> None:
    rows = [{"id": 1, "name": "Mug", "price": "1.299"}, {"id": 2, "name": "Cup", "price": "9,99"}]
    assert contents(Catalog(iter(rows))) == ({"1": 1299.0, "2": 9.99}, [])


@pytest.mark.parametrize(
    ("wish", "low", "high"),
    [
        ("a mug under 1,299", None, 1299.0),
        ("a mug under 9,99", None, 9.99),
        ("below 1.299,00 euros", None, 1299.0),
        ("up to 1 299 kr", None, 1299.0),
        ("between 10 and 20,50", 10.0, 20.5),
        ("1,299元以下", None, 1299.0),
        ("under 20 2 mugs", None, 20.0),
        ("under 1,2,3", None, 1.2),
    ],
)
def test_a_wish_names_its_price_as_catalogues_do(wish: str, low: float | None, high: float | None) -> None:
    with Catalog([{"id": 1, "name": "Mug", "price": 5}]) as catalog:
        query = read_wish(wish, catalog, {}).query
    assert (query.min_price, query.max_price) == (low, high)


ROWS = 'id;name;price\n01;Größe "é";9,99\n02;Cup, blue;12,50\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("before", ["", "\n\n", "sep=;\n", ";;\n \n"])
def test_a_table_reads_alike_in_every_form_it_is_exported_in(
    tmp_path: Path, encoding: str, ending: str, before: str
) -> None:
    text = (before + ROWS.replace('"', "")).replace("\n", ending)
    with opened(tmp_path, text.encode(encoding)) as catalog:
        assert [(item.id, item.name, item.price) for item in catalog.all()] == [
            ("01", "Größe é", 9.99),
            ("02", "Cup, blue", 12.5),
        ]
        assert catalog.problems == []


def test_a_byte_order_mark_may_precede_the_separator_line_and_quoted_names(tmp_path: Path) -> None:
    assert contents(opened(tmp_path, '\ufeffsep=;\r\n"id";"name";"price"\r\n1;Mug;2,50\r\n')) == ({"1": 2.5}, [])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["shop.csv", "shop.tsv"])
def test_the_delimiter_is_the_one_that_names_the_columns(tmp_path: Path, delimiter: str, name: str) -> None:
    text = "\n".join(delimiter.join(row) for row in (["id", "name", "note", "price"], ["7", "Mug", "x", "3.50"]))
    assert contents(opened(tmp_path, text, name)) == ({"7": 3.5}, [])


def test_chinese_tables_are_read_in_the_encoding_of_excel(tmp_path: Path) -> None:
    with opened(tmp_path, "id,name,price\n1,红色马克杯，大号,￥19.90\n".replace("，", "").encode("gb18030")) as catalog:
        assert [(item.name, item.price) for item in catalog.all()] == [("红色马克杯大号", 19.9)]


def test_an_encoding_that_cannot_be_told_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not UTF-8 \(line 3\)"):
        opened(tmp_path, "id,name\n1,Mug\n2,Красная кружка\n".encode("cp1251"))


@pytest.mark.parametrize(
    "wrong", ['2,"Cup,2\n', '2,"Cup" red,2\n', '2,Cup,"2\n', '"2,Cup,2\n'], ids=["name", "stray", "price", "first"]
)
@pytest.mark.parametrize(
    "behind", ["3,Bowl,3\n4,Jug,4\n", '3,"Bowl, deep",3\n4,Jug,4\n', '3,Bowl,3\n4,Jug 5",4\n5,Pan,5\n']
)
def test_a_quotation_mark_that_is_not_closed_costs_its_own_row_alone(tmp_path: Path, wrong: str, behind: str) -> None:
    found, problems = contents(opened(tmp_path, f"id,name,price\n1,Mug,1\n{wrong}{behind}"))
    assert found == {line[0]: float(line[0]) for line in ["1", *behind.splitlines()]}
    assert len(problems) == 1
    assert problems[0].startswith("line 3: has an unclosed or misplaced quotation mark")


def test_a_quoted_cell_may_hold_line_breaks_and_delimiters(tmp_path: Path) -> None:
    text = 'id,name,price\n1,"Mug,\n\nvery ""big"", red",1\n2, "Cup, blue",2,,\n3,Nail 5",3\n4,Pan,4,5\n'
    with opened(tmp_path, text) as catalog:
        assert [item.name for item in catalog.all()] == ['Mug, very "big", red', "Cup, blue", 'Nail 5"']
        assert [str(problem) for problem in catalog.problems] == ["line 7: the row has 4 cells, expected 3"]


def test_lines_that_look_like_rows_are_not_swallowed_by_a_quotation_mark(tmp_path: Path) -> None:
    text = 'id,name,price,note\n1,"Shirt,5,x\n2,Hat,6\n\n3,Cap",7,n\n4,Bag,8,y'
    found, problems = contents(opened(tmp_path, text))
    assert found == {"2": 6.0, "3": 7.0, "4": 8.0}
    assert len(problems) == 1
    assert problems[0].startswith("line 2: has an unclosed or misplaced quotation mark")


@pytest.mark.parametrize(
    "text",
    [
        "Sizes:\nS, M, L\nred, green, blue",
        "Wash, cold\n2 sleeves,red\nNo. 3,4",
        "Numbers:\n36, 37, 38\n39, 40",
        "a\n\nb",
    ],
)
def test_lists_in_a_quoted_text_are_no_rows(tmp_path: Path, text: str) -> None:
    with opened(tmp_path, f'id,name,description\n1,Hat,"{text}"\n2,Cap,plain') as catalog:
        assert [(item.id, item.name) for item in catalog.all()] == [("1", "Hat"), ("2", "Cap")]
        assert not catalog.problems


@pytest.mark.parametrize("text", ["Masse:\n10,5 cm hoch", "Set of\n2,000 pieces", "a\n1,5 l\n2,5 l"])
@pytest.mark.parametrize("head", ["id,name,description,price", "id,description"])
def test_a_number_in_a_quoted_text_is_no_row(tmp_path: Path, text: str, head: str) -> None:
    short = head.count(",") == 1
    rows = f'1,"{text}"\n2,x' if short else f'1,Becher,"{text}",9.99\n2,Cup,"x",3'
    with opened(tmp_path, f"{head.replace('description', 'name') if short else head}\n{rows}") as catalog:
        assert [item.id for item in catalog.all()] == ["1", "2"]
        assert not catalog.problems


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('id,name,note\n1,Hat,"Sizes:\n2,3,4\nall good"\n5,Cap,plain', [2, 3]),
        ('id,name,note\n1,Hat,"Colors,\nred,green,blue"\n5,Cap,plain', []),
        ('id,name,note\nhat,Hat,"Colors,\nred,green,blue"\n5,Cap,plain', [2, 3]),
        ('id,name,note\n1,"Hat\nx-1,Bag,ok\ny-2,Pan,ok"\n5,Cap,plain', [2, 3, 4]),
        ('id,name,note\n1,"Hat\nbag,Bag,ok\npan,Pan,ok\n",plain\n5,Cap,plain', [2, 3, 4]),
        ('name,id,note\n"Hat\nBag,x-1,ok",1,plain\nCap,5,plain', []),
        ('name,id,note\n"Hat\nBag,x-1,ok\n",1,plain\nCap,5,plain', [2, 3]),
        ('id,name\n1,"Hat\nx-1,Bag"\n5,Cap', [2, 3]),
    ],
    ids=["some", "none", "words", "other ids", "words as ids", "more cells", "ids behind names", "two cells"],
)
def test_what_may_be_rows_or_a_text_is_a_problem_and_no_product(tmp_path: Path, text: str, lines: list[int]) -> None:
    found, problems = contents(opened(tmp_path, text))
    assert list(found) == (["5"] if lines else ["1", "5"])
    assert [int(problem.removeprefix("line ").partition(":")[0]) for problem in problems] == lines


@pytest.mark.parametrize(
    "text",
    [
        'id,"name,price\n1,Mug,2\n2,Cup,3\n',
        'id,"name,price\n1,Mug,2\n2,"Cup",3\n',
        'id,name,"price\n1,Mug,2\n2,Cup,3\n"',
    ],
    ids=["not closed", "closed by a later one", "around all rows"],
)
def test_a_quotation_mark_in_the_head_swallows_no_rows(tmp_path: Path, text: str) -> None:
    found, problems = contents(opened(tmp_path, text))
    assert found == {"1": 2.0, "2": 3.0}
    assert problems[0].startswith("line 1: the header has an unclosed or misplaced quotation mark")


@pytest.mark.parametrize("depth", [150, 950, 100_000])
@pytest.mark.parametrize("name", ["shop.jsonl", "shop.json"])
def test_a_row_that_is_nested_too_deeply_is_a_problem_of_its_line(tmp_path: Path, name: str, depth: int) -> None:
    deep = '{"id": "2", "name": "x", "z": ' + "[" * depth + "]" * depth + "}"
    rows = ['{"id": "1", "name": "Mug"}', deep, '{"id": "3", "name": "Cup"}']
    text = "\n".join(rows) if name.endswith("l") else "[" + ",\n".join(rows) + "]"
    found, problems = contents(opened(tmp_path, text, name))
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")
    assert "nested too deeply" in problems[0]
    if name.endswith("l"):  # in a list there is no telling where the next row starts
        assert set(found) == {"1", "3"}
    assert "1" in found


def test_attributes_that_are_nested_too_deeply_are_a_problem(tmp_path: Path) -> None:
    found, problems = contents(opened(tmp_path, 'id,name,attributes\n1,Mug,{"a":' + "[" * 99_000 + "\n2,Cup,\n"))
    assert list(found) == ["2"]
    assert "nested too deeply" in problems[0]


@pytest.mark.parametrize(("name", "text"), [("shop.csv", "id,name,price\n"), ("shop.csv", ""), ("shop.json", "[]")])
def test_a_file_with_a_head_alone_says_that_it_has_no_rows(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"the catalogue {name} has no rows"):
        opened(tmp_path, text, name)


def test_a_currency_beside_a_price_is_shown_with_it(tmp_path: Path) -> None:
    text = "id,name,price,currency\n1,Mug,$.99,\n2,Cup,12 EUR,\n3,Jug,$5,CAD\n4,Pan,7,\n"
    with opened(tmp_path, text) as catalog:
        assert [item.price_text for item in catalog.all()] == ["0.99 $", "12.00 EUR", "5.00 CAD", "7.00"]


def test_an_index_of_an_older_way_of_reading_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, index = tmp_path / "shop.csv", tmp_path / "shop.index"
    file.write_text("id,name,price\n1,Mug,$.99\n")
    monkeypatch.setattr(read_file, "VERSION", 1)
    monkeypatch.setattr(read_file.prices, "read", lambda text: Amount(99.0))
    with Catalog(file, index=index) as catalog:
        assert [item.price for item in catalog.all()] == [99.0]
    monkeypatch.undo()
    with Catalog(file, index=index) as catalog:
        assert [item.price for item in catalog.all()] == [0.99]
