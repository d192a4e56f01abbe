"""The forms of other benchmarks' data sets, files of every kind, and endpoints as people write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qvl.bench.dataset import Files
from qvl.bench.exchange import base_url
from qvl.errors import ConfigError
from tests.bench.test_input import pictures_of, text_of


def items(path: Path) -> list[tuple[str, str]]:
    """(id, text of all messages) of each item."""
    return [
        (item.id, " ".join(text_of(message["content"]) for message in item.messages))
        for item in Files([str(path)], strict=True)
    ]


SHARED = [
    {"from": "system", "value": "Be brief."},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "Two."},
    {"from": "human", "value": "Three?"},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("hello", [("d.jsonl:1", "hello")]),
        (["a", "b"], [("d.jsonl:1/1", "a"), ("d.jsonl:1/2", "b")]),
        ({"id": 7, "prompt": ["a", "b"]}, [("7/1", "a"), ("7/2", "b")]),
        ({"id": "s", "conversations": SHARED}, [("s", "Be brief. One?")]),
        ({"conversation": [[{"role": "user", "content": "Arena?"}]]}, [("d.jsonl:1", "Arena?")]),
        ({"prompt": [{"role": "user", "content": "listed"}]}, [("d.jsonl:1", "listed")]),
        ({"instruction": "Add.", "input": "1 2"}, [("d.jsonl:1", "Add.\n1 2")]),
        ({"messages": [{"id": "m1", "created_at": 3, "role": "user", "content": "kept"}]}, [("d.jsonl:1", "kept")]),
    ],
)
def test_rows_of_other_data_sets_are_read(row: Any, expected: Any, lines) -> None:
    assert items(lines(json.dumps(row), name="d.jsonl")) == expected


def test_the_longest_answer_of_vllm_and_guidellm_is_max_tokens(endpoint, measure, lines) -> None:
    rows = [{"prompt": "a", "output_tokens": 5}, {"prompt": "b", "prompt_tokens_count": 9, "output_tokens_count": 6}]
    measure(lines(*rows), endpoint)
    assert [(sent.body["max_tokens"], set(sent.body["messages"][0])) for sent in endpoint.chats] == [
        (5, {"role", "content"}), (6, {"role", "content"})
    ]  # fmt: skip


def test_labels_of_stored_messages_are_not_sent(endpoint, measure, lines) -> None:
    measure(lines({"messages": [{"id": "m1", "timestamp": 3, "role": "user", "content": "hi"}]}), endpoint)
    assert endpoint.chats[0].body["messages"] == [{"role": "user", "content": "hi"}]


def test_a_picture_of_llava_stands_where_it_is_marked(endpoint, measure, lines, picture: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat brand?"}, {"from": "gpt", "value": "NORVIK"}]
    measure(lines({"id": "l", "image": picture.name, "conversations": turns}), endpoint)
    (sent,) = endpoint.chats
    assert pictures_of(sent.body) == [picture.read_bytes()]
    assert [part["type"] for part in sent.body["messages"][0]["content"]] == ["image_url", "text"]


def test_files_of_every_kind_hold_the_same_requests(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "One?"}, {"id": "b", "prompt": "Two, really?"}]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "d.csv").write_text('id,prompt\na,One?\nb,"Two, really?"\n')
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    for name in ("d.jsonl", "d.jsonl.gz", "d.json", "lines.json", "d.csv", "d.csv.gz"):
        assert items(tmp_path / name) == [("a", "One?"), ("b", "Two, really?")], name
    (tmp_path / "d.txt").write_text("One?\n\nTwo, really?\n")
    assert items(tmp_path / "d.txt") == [("d.txt:1", "One?"), ("d.txt:3", "Two, really?")]
    (tmp_path / "one.json").write_text('[{"role": "user", "content": "a conversation"}]')
    assert items(tmp_path / "one.json") == [("one.json:1", "a conversation")]


def test_parquet_with_pictures_in_it_arrives(endpoint, measure, picture: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    shown = {"bytes": picture.read_bytes(), "path": "red.png"}
    rows = [{"id": "p", "prompt": "What?", "image": shown}, {"id": "q", "prompt": "Text", "image": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    measure(tmp_path / "d.parquet", endpoint)
    assert [pictures_of(sent.body) for sent in endpoint.chats] == [[picture.read_bytes()], []]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("d.csv", b"prompt\n\xff\xfe\n", "cannot be read"),
        ("d.parquet.gz", b"PAR1", "unpack it"),
        ("d.json", b'[{"conversations": [{"from": "gpt", "value": "x"}]}]', "no turn of a user"),
        ("d.json", b"[17]", "a row must be an object"),
        ("d.jsonl", b'{"prompt": "a", "output_tokens": "many"}', "must be a number of tokens"),
        ("d.jsonl", b'{"conversations": [{"from": "martian", "value": "x"}]}', "unknown speaker 'martian'"),
    ],
)
def test_what_cannot_be_read_is_said(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        items(tmp_path / name)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://h:1", "http://h:1/v1"),
        ("https://h/", "https://h/v1"),
        ("h:1/v1/", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("https://gateway.example/openai/v3?key=1", "https://gateway.example/openai/v3?key=1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_an_endpoint_is_completed(written: str, meant: str) -> None:
    assert base_url(written) == meant


def test_an_endpoint_without_scheme_and_v1_is_measured(endpoint, bench, lines, tmp_path: Path) -> None:
    short = endpoint.url.removeprefix("http://").removesuffix("/v1")
    ran = bench("--url", short, "-d", lines({"prompt": "hi"}), "--out", tmp_path / "o", "--no-html")
    assert ran.exit_code == 0, ran.output
