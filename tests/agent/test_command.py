from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import qvl
from qvl.agent.about import asks_about_agent
from qvl.agent.catalog.catalog import sample_path
from qvl.agent.page import page as page_of
from qvl.agent.steps import Event, Recommendation
from qvl.agent.trace import Trace
from qvl.cli import agent as command
from qvl.cli.options import PipelineOptions
from tests.agent.catalog.test_catalog import ROWS, write
from tests.agent.conftest import RED_MUG, SAMPLE, ShopModel, down
from tests.scripted_endpoint import ScriptedEndpoint, Text


class ShopPlugin:
    """Gives `shop:clerk` and `shop:down` to pipelines that the command builds."""

    made: list[ShopModel]

    def __init__(self) -> None:
        self.made = []

    @qvl.hookimpl
    def register_backends(self, register: Callable[[str, Any], None]) -> None:
        def make(model: str) -> ShopModel:
            found = ShopModel(down() if model == "mute" else "[1] fits.", model=model)
            found.seen = down() if model == "down" else found.seen
            self.made.append(found)
            return found

        register("shop", make)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ShopPlugin:
    from qvl.plugins import host

    plugin = ShopPlugin()

    class Point:
        name = "shop"

        def load(self) -> ShopPlugin:
            return plugin

    monkeypatch.setattr(host, "entry_points", lambda group: [Point()])
    monkeypatch.setenv("QVL_CACHE", f"sqlite:///{tmp_path / 'cache.db'}")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("VISION_MODEL_URL", "VISION_API_KEY", "VISION_MODEL_NAME", "QVL_CATALOG"):
        monkeypatch.delenv(name, raising=False)
    return plugin


@pytest.fixture
def run(shop: ShopPlugin, tmp_path: Path) -> Callable[..., Any]:
    def call(*args: str, stdin: str | None = None) -> Any:
        from qvl.cli import app

        return CliRunner().invoke(app, ["agent", *args, "--index", str(tmp_path / "index.db")], input=stdin)

    return call


def test_the_chain_is_shown_with_times_and_the_answer(run: Any, picture: str, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    done = run("-f", picture, "-q", "in blue", "-m", "shop:clerk", "--html", str(page))
    assert done.exit_code == 0, done.output
    order = [done.stdout.index(word) for word in ("user:", "agent", "model: look", "tool: search", "answer", "fits.")]
    assert order == sorted(order)
    assert "cache miss" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "data:image/" in text
    assert "Haxley Iris 100" in text


def test_the_second_iteration_asks_no_model(run: Any, shop: ShopPlugin, picture: str) -> None:
    done = run("-f", picture, "-i", "2", "-m", "shop:clerk")
    assert done.exit_code == 0
    first, second = (line for line in done.stdout.splitlines() if line.startswith("run "))
    assert first.endswith(", 2 inferences")
    assert re.search(r", no inference, \d+ x faster than the first$", second)
    (model,) = shop.made
    assert (model.looked, len(model.requests)) == (1, 1)


def test_json_gives_events_and_the_recommendation(run: Any, picture: str) -> None:
    done = run("-f", picture, "-m", "shop:clerk", "--json")
    *events, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert next(line["event"]["step"] for line in events if line["event"]["kind"] == "end") == "analyze"
    assert last["recommendation"]["products"][0]["product"]["id"] == "MU-0001"


def test_a_conversation_keeps_the_picture(run: Any, shop: ShopPlugin, picture: str) -> None:
    done = run("--chat", "-m", "shop:clerk", stdin=f"{picture}\ncheaper ones?\n\n")
    assert done.exit_code == 0, done.output
    assert shop.made[0].looked == 1
    assert done.stdout.count("user:") == 2


def test_a_conversation_takes_a_picture_with_its_wish_and_tells_what_it_can_do(
    run: Any, shop: ShopPlugin, picture: str
) -> None:
    lines = f"What can you do?\ncheaper\n{picture} in blue\nlost.png\na.png b.png\n你能做什么？\n"
    done = run("--chat", "-m", "shop:clerk", stdin=lines)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("search the 240 products of sample.jsonl") == 2
    assert f"user: {picture} · in blue" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert [line[7:24] for line in errors] == ["no picture yet (n", "no such file: los", "2 pictures in one"]
    assert shop.made[0].looked == 1


@pytest.mark.parametrize(
    "line", ["what can you do?", "Who are you?", "help", "o que você sabe fazer?", "¿qué sabes hacer?"]
)
def test_questions_about_the_agent_are_told_from_wishes(line: str) -> None:
    assert asks_about_agent(line)
    assert not asks_about_agent("what can you do in blue?")
    assert not asks_about_agent("something to help my back")


@pytest.mark.parametrize("end", ["quit\n", "Exit\n", ""])
def test_a_conversation_ends_with_quit_exit_or_the_end_of_its_input(run: Any, picture: str, end: str) -> None:
    after = f"{end}cheaper ones?\n" if end else ""
    done = run("--chat", "-m", "shop:clerk", stdin=f"{picture}\n\n{after}")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("user:") == 1
    assert done.stderr.count("error") == 0


def test_failures_are_marked_where_they_happened(run: Any, picture: str) -> None:
    done = run("-f", picture, "-m", "shop:down")
    assert done.exit_code == 1
    assert "✗ model: look" in done.stdout
    assert "error: analyze failed: nothing listens" in done.stderr
    done = run("-f", picture, "-m", "shop:mute")
    assert done.exit_code == 1
    assert "✗ model" in done.stdout
    assert "The picture shows NORVIK mug" in done.stdout


def test_a_missing_picture_is_said_once_and_as_analyze_says_it(run: Any, shop: ShopPlugin) -> None:
    from qvl.cli import app

    plain = CliRunner().invoke(app, ["analyze", "lost.png", "-m", "shop:clerk"])
    done = run("-f", "lost.png", "-m", "shop:clerk")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert done.stderr.count("no such file") == 1
    talked = run("--chat", "-m", "shop:clerk", stdin="lost.png\n\n")
    assert "no such file: lost.png" in talked.stderr
    (line,) = run("-f", "lost.png", "-m", "shop:clerk", "--json").stdout.splitlines()
    assert json.loads(line)["error"]["code"] == "invalid_image"
    assert all(model.looked == 0 for model in shop.made)


def test_the_tree_reads_as_words(run: Any, picture: str) -> None:
    done = run("-f", picture, "-q", "under 100", "-m", "shop:clerk")
    assert "analysis: brand NORVIK, category mug, color red, count 1" in done.stdout
    assert "ids: MU-0001, " in done.stdout
    trace = Trace()
    trace.add(Event("start", "analyze", "analyze", 0.0))
    trace.add(Event("end", "analyze", "analyze", 0.0, {"confidence": 0.9951678819307869}, 0.1))
    assert trace.steps[0].arguments == {"confidence": "99.5%"}


def test_search_and_all_need_no_model(run: Any, shop: ShopPlugin, tmp_path: Path) -> None:
    path = write(tmp_path / "shop.jsonl", [*ROWS, {"id": "1", "name": "again"}])
    done = run("--search", "cima", "--catalog", str(path))
    assert done.exit_code == 0
    assert "Norvik Cima" in done.stdout
    assert "1 of 1 that match, of 4 products" in done.stdout
    assert "line 5" in done.stderr
    some = run("--search", "norvik", "-n", "1", "--catalog", str(path))
    assert "1 of 2 that match, of 4 products; --limit shows more" in some.stdout
    done = run("--all", "--json", "--catalog", str(path))
    assert len(done.stdout.splitlines()) == 4
    assert "nothing found" in run("--search", "zzz", "--catalog", str(path)).stdout
    assert shop.made == []


def test_wrong_use_is_one_line_and_exit_code_2(run: Any, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in (
        (),
        ("--all", "--search", "x"),
        ("--all", "--catalog", "none.csv"),
        ("--chat", "--all"),
        ("--all", "--max-price", "3"),
    ):
        done = run(*args)
        assert done.exit_code == 2, args
        assert done.stderr.count("error: ") == 1
    monkeypatch.setenv("VISION_MODEL_URL", "http://localhost:1/v1/chat/completions")
    assert "VISION_MODEL_NAME" in run("-f", picture).stderr


def test_the_variables_of_older_scripts_name_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_MODEL_URL", "http://localhost:1/v1/chat/completions")
    monkeypatch.setenv("VISION_MODEL_NAME", "qwen3-vl")
    monkeypatch.setenv("VISION_API_KEY", "123")
    settings = command._endpoint(PipelineOptions(option=["total_timeout=5"]))
    assert (settings.model, settings.base_url) == ("openai:qwen3-vl", ["http://localhost:1/v1"])
    assert settings.option == ["total_timeout=5", 'api_key="123"']
    assert command._endpoint(PipelineOptions(model="local:x")) == PipelineOptions(model="local:x")


def test_the_variables_of_older_scripts_reach_the_endpoint(
    run: Any, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Text(json.dumps(RED_MUG)), Text("[1] fits."))
        monkeypatch.setenv("VISION_MODEL_URL", f"{endpoint.url}/chat/completions")
        monkeypatch.setenv("VISION_MODEL_NAME", "qwen3-vl")
        monkeypatch.setenv("VISION_API_KEY", "sk-older")
        done = run("-f", picture, "-O", "probe=false")
        assert done.exit_code == 0, done.output
        assert "Norvik Cima 500 (10.90 EUR, MU-0001) fits." in done.stdout
        asked = [received for received in endpoint.requests if received.path.endswith("/chat/completions")]
        assert [received.body["model"] for received in asked] == ["qwen3-vl", "qwen3-vl"]
        headers = {name.lower(): value for name, value in asked[0].headers.items()}
        assert headers["authorization"] == "Bearer sk-older"


def test_pages_and_trees_obey_nothing_in_the_data() -> None:
    trace = Trace("<script>alert(1)</script> [bold]x[/]", "a.png")
    trace.add(Event("start", "analyze", "analyze", 0.0))
    trace.add(Event("error", "analyze", "analyze", 0.0, {"error": "<b>[/nope]</b>"}, 0.1))
    page = page_of(trace, Recommendation("<i>", failed="analyze"))
    assert "<script>" not in page
    assert "<b>" not in page
    trace.tree()


def test_the_sample_in_the_package_is_the_example() -> None:
    assert sample_path().read_bytes() == SAMPLE.read_bytes()
    assert len(SAMPLE.read_text().splitlines()) >= 200


def test_help_loads_neither_langchain_nor_mcp() -> None:
    code = (
        "import sys\nfrom qvl.cli import load_command\nload_command('agent')\n"
        "print([m for m in ('langchain', 'langgraph', 'langchain_core', 'mcp', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr
