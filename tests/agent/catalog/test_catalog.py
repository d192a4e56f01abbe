from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl import Pipeline
from qvl.agent import Catalog, Product, Query, Recommender
from qvl.errors import ConfigError
from qvl.suggest import install_line
from qvl.tiny.render import BRANDS, CATEGORIES, CATEGORY_NAMES, COLOR_NAMES, COLORS
from tests.agent.conftest import ShopModel

SAMPLE = Path(__file__).parents[3] / "examples" / "catalog" / "products.jsonl"
ROWS: list[dict[str, Any]] = [
    {
        "id": "1",
        "name": "Norvik Cima",
        "brand": "NORVIK",
        "category": "mug",
        "price": 10,
        "attributes": {"color": "red"},
    },
    {
        "id": "2",
        "name": "Norvik Alba",
        "brand": "NORVIK",
        "category": "mug",
        "price": 20,
        "attributes": {"color": "blue"},
    },
    {
        "id": "3",
        "name": "Chapéu Haxley",
        "brand": "HAXLEY",
        "category": "hat",
        "price": 30,
        "title": "红色陶瓷马克杯子",
    },
    {"id": "4", "name": "Podari Luna", "brand": "PODARI", "category": "lamp", "size": 4},
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    with Catalog(SAMPLE, index=tmp_path_factory.mktemp("index") / "sample.db") as catalog:
        yield catalog


@pytest.fixture
def shop() -> Iterator[Catalog]:
    with Catalog(ROWS) as catalog:
        yield catalog


def ids(found: Any) -> list[str]:
    return [hit.product.id for hit in found.hits]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    # Two writes within one tick of the file system's clock must count as two.
    os.utime(path, ns=(random.getrandbits(40), random.getrandbits(40)))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[\n{"id": 1, "name": "Cup", "price": 3, "attributes": {"color": "red"}, "stock": 7}\n]'),
        ("b.json", '{"products": [{"id": 1, "name": "Cup", "price": 3, "attributes": {"color": "red"}, "stock": 7}]}'),
        ("c.jsonl", '{"ID": "1", "Name": "Cup", "price": "3.00", "attributes": {"color": "red"}, "stock": 7}\n'),
        ("d.csv", "id,name,price,attributes,stock\n1,Cup,€ 3.00,color=red,7\n"),
        ("e.csv", "\ufeffid;name;price;attributes.color;stock\n1;Cup;3;red;7\n"),
    ],
)
def test_every_format_gives_the_same_product_and_keeps_unknown_columns(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with Catalog(tmp_path / name, index=":memory:") as catalog:
        (found,) = catalog.all()
    assert (found.id, found.name, found.price, found.attributes) == ("1", "Cup", 3.0, {"color": "red"})
    assert str(found.extra["stock"]) == "7"


def test_bad_rows_are_listed_with_their_lines_and_the_rest_is_loaded(tmp_path: Path) -> None:
    lines = [
        '{"id": "1", "name": "Cup"}',
        "",
        "{broken",
        '{"name": "no id"}',
        '{"id": "2", "name": "Hat", "price": "cheap"}',
        '{"id": "1", "name": "again"}',
        "[1]",
        '{"id": "3", "name": "Bag", "price": -1}',
        '{"id": "4", "name": "Lamp", "price": 1e999}',
        '{"id": "5", "name": "Chair"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with Catalog(path, index=tmp_path / "i.db") as catalog:
        assert len(catalog) == 2
        problems = {problem.line: problem.message for problem in catalog.problems}
    assert list(problems) == [3, 4, 5, 6, 7, 8, 9]
    assert "line 1" in problems[6]
    assert "'cheap'" in problems[5]
    with Catalog(path, index=tmp_path / "i.db") as again:
        assert not again.changes.read
        assert len(again.problems) == 7


def test_csv_rows_keep_their_lines_when_cells_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('id,name\n1,"a\nb"\n,missing\n2,c,too,many\n')
    with Catalog(path, index=":memory:") as catalog:
        assert [problem.line for problem in catalog.problems] == [4, 5]


def test_json_rows_are_named_by_the_line_on_which_they_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"id": 1,\n "name": "Cup"},\n{"id": 2},\n7,\n{"id": 3, "name": "Hat"}\n]')
    with Catalog(path, index=":memory:") as catalog:
        assert {problem.line: problem.message for problem in catalog.problems} == {
            4: "product '2' has no name",
            5: "the row is a int, not an object",
        }
        assert len(catalog) == 2


def test_indexing_shows_a_bar_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", ROWS)
    Catalog(path, index=":memory:").close()
    assert capsys.readouterr().err == ""
    Catalog(path, index=":memory:", progress=True).close()
    assert "indexing: 4 products" in capsys.readouterr().err


def test_the_sample_is_of_the_bundled_models_world(sample: Catalog) -> None:
    products = list(sample.all())
    assert len(products) >= 200
    assert {item.category for item in products} == set(CATEGORIES)
    assert {item.attributes["color"] for item in products} == set(COLORS)
    assert {item.brand for item in products} <= set(BRANDS)
    assert all(item.price for item in products)


@pytest.mark.parametrize("text", ["", "id,name\n", "id,name\n,x\n"])
def test_a_catalogue_without_a_product_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rows\.csv") as caught:
        Catalog(path, index=":memory:")
    assert "\n" not in str(caught.value)


def test_no_catalogue_wrong_kinds_and_broken_encodings_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_bytes(b"id,name\n1,\xff\xfe\n")
    (tmp_path / "c.json").write_text('{"rows": []}')
    for name in ("none.csv", "a.txt", "b.csv", "c.json"):
        with pytest.raises(ConfigError):
            Catalog(tmp_path / name, index=":memory:")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("norvik", {"1", "2"}),
        ("CHAPEU", {"3"}),
        ("chap", {"3"}),
        ("mugs", {"1", "2"}),
        ("红色", {"3"}),
        ("杯", set()),
        ("杯子", {"3"}),
        ("我要陶瓷马克杯子", {"3"}),
    ],
)
def test_words_prefixes_diacritics_and_chinese_are_found(shop: Catalog, text: str, wanted: set[str]) -> None:
    assert wanted <= set(ids(shop.search(text)))
    assert not wanted or ids(shop.search(text))[0] in wanted


@pytest.mark.parametrize("text", ["the of and", "", "   ", "的了", "!!! ???"])
def test_a_query_of_only_stop_words_finds_nothing_and_does_not_fail(shop: Catalog, text: str) -> None:
    assert shop.search(text).hits == ()


@pytest.mark.parametrize(
    "text",
    [
        "' OR 1=1 --",
        '"; DROP TABLE products; --',
        'name:norvik AND NOT (body : "x" NEAR(a b, 2)) ^mug*',
        "norvik*",
        "\x00norvik\x00",
        "a" * 10_000,
        "norvik " * 2000,
        "%_%",
        "\ud800",
    ],
)
def test_sql_and_fts_syntax_is_only_text(shop: Catalog, text: str) -> None:
    shop.search(text)
    shop.search(Query(brand=text, attributes={text: text}, only={text: text}))
    assert len(list(shop.all())) == 4


def test_conditions_hold_for_every_hit(sample: Catalog) -> None:
    found = sample.search("mug", only={"color": "red"}, min_price=5, max_price=15, limit=50)
    assert found.hits
    for hit in found.hits:
        assert hit.product.attributes["color"] == "red"
        assert 5 <= (hit.product.price or 0) <= 15
    lamps = {item.id for item in sample.all() if item.brand == "NORVIK" and item.category == "lamp"}
    assert set(ids(sample.search(only={"brand": "norvik", "category": "LAMP"}, limit=50))) == lamps
    everything = sample.search(max_price=20, limit=100).hits
    assert len(everything) == min(100, sum((item.price or 0) <= 20 for item in sample.all()))


def test_products_without_a_price_are_in_no_price_range(shop: Catalog) -> None:
    assert "4" not in ids(shop.search("luna", max_price=1000))


def test_every_hit_says_why_it_was_found(shop: Catalog) -> None:
    (best, *_) = shop.search(Query("cima", brand="norvik", attributes={"color": "Red"}, max_price=15)).hits
    assert best.why == ("brand is NORVIK", "color is red", "name has 'cima'", "price 10.00 is up to 15")


def test_a_word_that_is_an_exact_value_counts_as_one(sample: Catalog) -> None:
    found = sample.search("blue mugs, canvas or so", limit=2)
    assert {hit.product.category for hit in found.hits} == {"mug"}
    assert set(found.hits[0].why) >= {"category is mug", "color is blue"}


def test_counting_agrees_with_looking_at_every_product(sample: Catalog) -> None:
    products = list(sample.all())
    assert sample.count("norvik") == sum(item.brand == "NORVIK" for item in products)
    either = sum(item.category == "mug" or item.attributes["color"] == "blue" for item in products)
    assert sample.count("blue mug") == either
    cheap = Query(category="mug", only={"color": "red"}, max_price=15)
    assert sample.count(cheap) == len(sample.search(cheap, limit=100).hits)
    assert sample.count(Query(max_price=20)) == sum((item.price or 0) <= 20 for item in products)
    assert sample.count("") == sample.count("zzzz") == 0


def test_what_has_more_of_the_wish_comes_first(shop: Catalog) -> None:
    assert ids(shop.search(Query(brand="NORVIK", category="mug", attributes={"color": "blue"})))[:2] == ["2", "1"]


def test_only_what_changed_is_indexed_again(tmp_path: Path) -> None:
    path, index = write(tmp_path / "p.jsonl", ROWS), tmp_path / "i.db"
    with Catalog(path, index=index) as catalog:
        assert catalog.changes.added == 4
    changed = [ROWS[0], {**ROWS[1], "name": "Norvik Zeta"}, ROWS[3], {"id": "5", "name": "Kasumo Iris"}]
    with Catalog(write(path, changed), index=index) as catalog:
        changes = catalog.changes
        assert (changes.added, changes.changed, changes.removed, changes.unchanged) == (1, 1, 1, 2)
        assert ids(catalog.search("zeta")) == ["2"]
        assert ids(catalog.search("alba")) == ids(catalog.search("haxley")) == []
        assert ids(catalog.search("iris")) == ["5"]
        assert catalog.values("haxley") == []
    with Catalog(path, index=index) as catalog:
        assert not catalog.changes.read


def test_an_update_that_fails_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    path, index = write(tmp_path / "p.jsonl", ROWS), tmp_path / "i.db"
    Catalog(path, index=index).close()
    path.write_bytes(path.read_bytes() + b'{"id": "9", "name": "\xff"}\n')
    with pytest.raises(ConfigError, match="UTF-8"):
        Catalog(path, index=index)
    with Catalog(write(path, ROWS), index=index) as catalog:
        assert catalog.changes.unchanged == 4


def test_an_incremental_index_answers_as_a_new_one(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    dice = random.Random(3)
    path, index = write(tmp_path / "p.jsonl", rows[:150]), tmp_path / "i.db"
    Catalog(path, index=index).close()
    later = [{**row, "price": row["price"] + dice.randint(0, 1)} for row in rows[60:]]
    with Catalog(write(path, later), index=index) as grown, Catalog(path, index=":memory:") as fresh:
        assert grown.changes.removed == 60
        for text in ("norvik alba", "red mug", "glass", "蓝色杯子", "oak chair 300"):
            ours = {(hit.product.id, round(hit.score, 6)) for hit in grown.search(text, limit=20).hits}
            assert ours == {(hit.product.id, round(hit.score, 6)) for hit in fresh.search(text, limit=20).hits}


def test_vectors_join_in_by_reciprocal_rank_and_keep_conditions(sample: Catalog, tmp_path: Path) -> None:
    asked: list[Query] = []

    def near(query: Query, limit: int) -> list[str]:
        asked.append(query)
        return ["LA-0013", "MU-0002", "no such id", "MU-0001"]

    with Catalog(SAMPLE, index=tmp_path / "i.db", retriever=near) as catalog:
        query = Query(brand="NORVIK", category="mug", attributes={"color": "purple"}, picture=b"x")
        assert ids(catalog.search(query))[0] == "MU-0002"
        assert "LA-0013" in ids(catalog.search(query))
        assert "number 2 of the nearest by vectors" in catalog.search(query).hits[0].why
        assert "LA-0013" not in ids(catalog.search(Query("norvik", only={"category": "mug"}), limit=50))
        assert asked[0].picture == b"x"


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        Catalog(SAMPLE, index=tmp_path / "i.db")
    assert "delete it" in str(caught.value)


def test_a_file_that_was_refused_is_not_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "i.db").write_bytes(b"this is no database" * 100)
    connect, connections = sqlite3.connect, list[sqlite3.Connection]()

    def recorded(*args: Any, **options: Any) -> sqlite3.Connection:
        connections.append(connect(*args, **options))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    with pytest.raises(ConfigError, match="cannot be used"):
        Catalog(SAMPLE, index=tmp_path / "i.db")
    pipeline = Pipeline(backend=ShopModel(), cache="off")
    with Catalog(SAMPLE) as catalog, pipeline, pytest.raises(ConfigError, match="cannot be used"):
        Recommender(pipeline, catalog, checkpoints=tmp_path / "i.db")
    assert len(connections) == 3
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_limits_and_prices_that_cannot_be_are_refused(shop: Catalog) -> None:
    for wrong in ({"limit": 0}, {"limit": 101}, {"max_price": -1}, {"min_price": 5, "max_price": 1}):
        with pytest.raises(ConfigError):
            shop.search("x", **wrong)  # type: ignore[arg-type]


def held_out(products: list[Product]) -> list[tuple[Query, str, str]]:
    """(query as an analysis makes it, its plain words, the wanted id): four languages, brands in any case."""
    dice = random.Random(99)
    found = []
    for product in dice.sample(products, 160):
        language = dice.choice(("en", "en", "zh", "pt", "es"))
        category = CATEGORY_NAMES[language][product.category or ""]
        color = COLOR_NAMES[language][product.attributes["color"]]
        brand = dice.choice((str.upper, str.lower, str.title))(product.brand or "")
        query = Query(brand=brand, category=category, attributes={"color": color, "count": str(dice.randint(1, 4))})
        found.append((query, f"{brand} {category} {color}", product.id))
    return found


def substring_ranking(products: list[Product], text: str) -> list[str]:
    """The plain scoring: a word in the name counts 3, in the brand 2, in the category 1."""

    def score(item: Product) -> int:
        fields = ((item.name, 3), (item.brand or "", 2), (item.category or "", 1))
        return sum(weight for word in text.lower().split() for field, weight in fields if word in field.lower())

    return [item.id for item in sorted(products, key=lambda item: -score(item))]


def test_recall_at_3_is_at_least_095_and_beats_substring_scoring(sample: Catalog, record_property: Any) -> None:
    products = list(sample.all())
    queries = held_out(products)
    ours = sum(wanted in ids(sample.search(query, limit=3)) for query, _, wanted in queries) / len(queries)
    plain = sum(wanted in substring_ranking(products, text)[:3] for _, text, wanted in queries) / len(queries)
    record_property("recall_at_3", ours)
    record_property("substring_recall_at_3", plain)
    print(f"recall@3 {ours:.3f}, substring scoring {plain:.3f}, {len(queries)} queries")
    assert ours >= 0.95
    assert ours > plain


def test_the_catalogue_needs_no_langchain() -> None:
    code = (
        "import sys\n"
        "for name in ('langchain', 'langgraph', 'langchain_core', 'mcp', 'torch'): sys.modules[name] = None\n"
        "from qvl.agent import Catalog\n"
        "print(len(Catalog([{'id': 1, 'name': 'Cup'}]).search('cup').hits))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_what_needs_langchain_names_its_pip_line() -> None:
    code = (
        "import sys\nsys.modules['langchain_core'] = None\nimport qvl.agent\n"
        "try:\n    qvl.agent.QvlChatModel\nexcept qvl.MissingDependencyError as exc:\n    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert install_line("agent") in done.stdout, done.stderr


def test_every_public_name_is_there() -> None:
    import qvl.agent

    assert qvl.agent.__all__ == sorted(qvl.agent.__all__)
    assert all(getattr(qvl.agent, name) is not None for name in qvl.agent.__all__)
