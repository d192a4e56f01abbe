"""`qvl eval --against`: pairs of lines, whatever lists have; labels that are mistyped; what failed, of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from qvl import AsyncPipeline, ConfigError
from qvl.cli import app
from qvl.evaluation.against import against
from qvl.evaluation.evaluate import EvalReport, Evaluator
from qvl.evaluation.labelled import read_labelled
from qvl.types import JsonObject
from tests.evaluation.shelf import Reader
from tests.evaluation.test_evaluate import shelf
from tests.parity.away import AwayBackend
from tests.server.conftest import Running, serve

__all__ = ["serve"]

SCHEMA: JsonObject = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string"}},
        "lines": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"type": "string"}, "price": {"type": "number"}}},
        },
    },
}


async def answering(path: Path, answer: JsonObject) -> EvalReport:
    lines = read_labelled([str(path)])
    only = sorted({name for line in lines for name in line.expected})
    reader = Reader(answer=lambda sure: answer, logprobs=False)
    async with AsyncPipeline(backend=reader, cache="off") as pipe:
        return await Evaluator(pipe, lines, schema=SCHEMA, only=only).evaluate("reader")


@pytest.mark.anyio
async def test_a_list_that_is_too_long_is_worse_than_one_that_is_right(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"tags": ["a", "b"]} for _ in range(8)])
    right = await answering(path, {"tags": ["a", "b"]})
    longer = await answering(path, {"tags": ["a", "b", "c", "d"]})
    tags = against(longer, right, None).fields["tags.*"]
    assert (tags.count, tags.right_a, tags.right_b, tags.only_a) == (8, 8, 0, 8)
    tags = against(right, longer, None).fields["tags.*"]
    assert (tags.count, tags.right_a, tags.right_b, tags.only_b) == (8, 0, 8, 8)


@pytest.mark.anyio
async def test_items_of_one_list_are_one_observation(tmp_path: Path) -> None:
    """Three lists of twenty items tell nothing of sixty pictures."""
    path = shelf(tmp_path, [{"tags": [str(number) for number in range(20)]} for _ in range(3)])
    right = await answering(path, {"tags": [str(number) for number in range(20)]})
    wrong = await answering(path, {"tags": ["x"] * 20})
    found = against(wrong, right, None)
    assert found.fields["tags.*"].count == 3
    assert found.fields["tags.*"].p_value == pytest.approx(0.25)


@pytest.mark.anyio
async def test_a_list_of_objects_that_is_too_long_counts_among_all_that_label_it(tmp_path: Path) -> None:
    labels: list[JsonObject] = [{"lines": [{"name": "tea", "price": 2}]} for _ in range(5)]
    path = shelf(tmp_path, [*labels, {"tags": ["a"]}])
    row = {"name": "tea", "price": 2}
    right = await answering(path, {"tags": ["a"], "lines": [row]})
    longer = await answering(path, {"tags": ["a"], "lines": [row, row]})
    fields = against(longer, right, None).fields
    assert (fields["lines.*"].count, fields["lines.*"].right_a, fields["lines.*"].right_b) == (5, 5, 0)
    assert (fields["lines.*.name"].count, fields["lines.*.name"].right_b) == (5, 5)
    assert fields["tags.*"].count == 1
    assert fields["(whole answer)"].count == 6


@pytest.mark.anyio
async def test_a_list_that_should_be_empty(tmp_path: Path) -> None:
    path = shelf(tmp_path, [{"tags": []}, {"tags": []}])
    right, longer = await answering(path, {"tags": []}), await answering(path, {"tags": ["a", "b"]})
    tags = against(longer, right, None).fields["tags"]
    assert (tags.count, tags.right_a, tags.right_b) == (2, 2, 0)


@pytest.mark.parametrize(("line", "told"), [("expectd", "`expected` by 'expectd'"), ("answer", '{"image": "a.png"')])
def test_a_line_without_labels_names_what_may_be_meant(tmp_path: Path, line: str, told: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"image": "a.png", line: {"brand": "NORVIK"}}))
    with pytest.raises(ConfigError, match=r"labels.jsonl:1: no right answer in `expected`") as caught:
        read_labelled([str(labels)])
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none*.jsonl", "none.csv", "none"])
def test_a_file_that_is_not_there_is_none_of_labels(tmp_path: Path, name: str) -> None:
    for command in ("eval", "calibrate"):
        done = CliRunner().invoke(app, [command, str(tmp_path / name)])
        assert done.exit_code == 2
        assert "requests" not in done.output
        assert name in done.output


def test_what_failed_is_told_of_both_and_asked_again(tmp_path: Path, serve: Callable[..., Running]) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (64, 64 + ord(name)), "red").save(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "expected": {"Is it red?": True}} for name in ("a", "b")]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    backends = AwayBackend(), AwayBackend("other-vl")
    urls = [f"{serve(backend, cache='off').url}/v1" for backend in backends]
    other = f"openai:other-vl,base_url={urls[1]},api_key=x,max_retries=0"
    command = ["eval", str(tmp_path / "labels.jsonl"), "-q", "Is it red?", "-m", "openai:echo-vl"]
    command += ["--base-url", urls[0]]
    command += ["-O", "api_key=x", "-O", "max_retries=0", "--cache", str(tmp_path / "cache.db"), "--against", other]
    backends[1].away = ("red",)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert done.stderr.count(f"openai:other-vl, at {urls[1]}: ") == 2
    backends[1].away = ()
    for backend in backends:
        backend.requests = []
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    asked = [[one for one in backend.requests if "red" in one.messages[-1].text] for backend in backends]
    assert asked[0] == []
    assert len(asked[1]) >= 2
    # Which is which is told above the table.
    told = " ".join(done.stdout.split())
    assert f"openai:echo-vl, at {urls[0]}" in told
    assert f"against openai:other-vl, at {urls[1]}" in told
