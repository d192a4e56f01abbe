"""`qvl batch run`: what it answers, refuses and says. That it survives kill -9 is in `tests/server`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ran

Qvl = Callable[..., Ran]


def line(custom_id: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "grey", "messages": [{"role": "user", "content": f"say {custom_id}"}]} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def written(path: Path) -> dict[str, Any]:
    return {one["custom_id"]: one for one in map(json.loads, path.read_text().splitlines())}


def test_answers_and_errors_go_to_two_files(qvl: Qvl, folder: Path) -> None:
    other = line("b") | {"url": "/v1/completions", "body": {"model": "grey", "prompt": "say b"}}
    write(folder, line("a"), other, line("c", max_tokens=-1))
    ran = qvl("batch", "run", "in.jsonl")
    assert ran.code == 1
    assert ran.out == ""
    assert "2 answered in in.output.jsonl, 1 failed: see in.output.errors.jsonl" in ran.err
    assert written(folder / "in.output.jsonl").keys() == {"a", "b"}
    assert written(folder / "in.output.errors.jsonl")["c"]["response"]["status_code"] == 400


def test_a_second_run_asks_only_what_has_no_answer(qvl: Qvl, folder: Path) -> None:
    write(folder, line("a"), line("b", max_tokens=-1))
    assert qvl("batch", "run", "in.jsonl", "-o", "out.jsonl", "--errors", "bad.jsonl").code == 1
    before = (folder / "out.jsonl").read_text()
    assert qvl("batch", "run", "in.jsonl", "-o", "out.jsonl", "--errors", "bad.jsonl").code == 1
    assert (folder / "out.jsonl").read_text() == before
    assert len(written(folder / "bad.jsonl")) == 1
    # The one that failed is mended, and one is new: both are asked.
    write(folder, line("a"), line("b"), line("c"))
    assert qvl("batch", "run", "in.jsonl", "-o", "out.jsonl", "--errors", "bad.jsonl").code == 0
    assert (folder / "out.jsonl").read_text().startswith(before)
    assert written(folder / "out.jsonl").keys() == {"a", "b", "c"}
    assert not (folder / "bad.jsonl").exists()


def test_an_output_of_another_input_is_left_alone(qvl: Qvl, folder: Path) -> None:
    write(folder, line("a"))
    assert qvl("batch", "run", "in.jsonl").code == 0
    write(folder, line("a", temperature=0.5))
    ran = qvl("batch", "run", "in.jsonl")
    assert ran.code == 2
    assert "another request of the custom_id 'a'" in ran.error
    (folder / "notes.jsonl").write_text('{"my": "notes"}\n')
    ran = qvl("batch", "run", "in.jsonl", "-o", "notes.jsonl")
    assert ran.code == 2
    assert "notes.jsonl is not the output of a batch" in ran.error
    assert (folder / "notes.jsonl").read_text() == '{"my": "notes"}\n'


def test_each_bad_line_is_named_and_nothing_is_asked(qvl: Qvl, folder: Path) -> None:
    write(folder, line("a"), line("a"), line("b", model="gpt-7"), line("c") | {"url": "/v1/embeddings"})
    ran = qvl("batch", "run", "in.jsonl")
    assert ran.code == 2
    assert all(f"in.jsonl:{number}: " in ran.err for number in (2, 3, 4))
    assert not (folder / "in.output.jsonl").exists()
    write(folder, line("b", model="gpt-7"))
    assert qvl("batch", "run", "in.jsonl", "--any-model-name").code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.jsonl"], "none.jsonl is not a file"),
        (["."], ". is not a file"),
        (["in.jsonl", "-o", "in.jsonl"], "three files"),
        (["in.jsonl", "-o", "none/out.jsonl"], "cannot be written"),
        (["empty.jsonl"], "the file has no requests"),
        (["in.jsonl", "-m", "parrot:down"], "nothing listens"),
    ],
)
def test_what_cannot_be_run_is_one_line(qvl: Qvl, folder: Path, args: list[str], message: str) -> None:
    write(folder, line("a", model="down") if "parrot:down" in args else line("a"))
    (folder / "empty.jsonl").write_text("\n")
    ran = qvl("batch", "run", *args)
    assert ran.code == (1 if "parrot:down" in args else 2)
    assert message in (ran.err if "empty.jsonl" in args else ran.error)
    assert "Traceback" not in ran.err
    assert not list(folder.glob("*.lock"))
