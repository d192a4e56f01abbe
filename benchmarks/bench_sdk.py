"""One call through `Pipeline("openai:…")` beside the bare openai client, LiteLLM's SDK and ChatOpenAI.

    python benchmarks/bench_sdk.py [--calls 400] [--rounds 5] [--peers FOLDER]

The same endpoint, a process that answers at once, serves all; each client runs in a process of its own, in turn, round
after round, one call after the other. The peers live in an environment of their own, since they pin an older openai.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "examples" / "pictures" / "norvik-mug-red.png"
MODEL = "bench"
QVL = ("qvl", "openai", "langchain")
CLIENTS = {
    "openai": "openai client",
    "qvl": "qvl `Pipeline`",
    "langchain": "ChatOpenAI",
    "litellm": "LiteLLM SDK",
}
Call = Callable[[str], Any]


def content(question: str, picture: str) -> Any:
    if not picture:
        return question
    return [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]


def data_url() -> str:
    return "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()


def bare_client(url: str, pictured: bool) -> tuple[Call, Call]:
    import openai

    picture = data_url() if pictured else ""
    client = openai.OpenAI(base_url=url, api_key="none")
    coming = openai.AsyncOpenAI(base_url=url, api_key="none")

    def arguments(question: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": content(question, picture)}]}

    async def later(question: str) -> str:
        return (await coming.chat.completions.create(**arguments(question))).choices[0].message.content

    return lambda question: client.chat.completions.create(**arguments(question)).choices[0].message.content, later


def qvl(url: str, pictured: bool) -> tuple[Call, Call]:
    from qvl import AsyncPipeline, Pipeline

    pictures = [data_url()] if pictured else []
    pipe = Pipeline(f"openai:{MODEL}", base_url=url, cache="off", probe=False)
    coming = AsyncPipeline(f"openai:{MODEL}", base_url=url, cache="off", probe=False)

    async def later(question: str) -> str:
        return (await coming.ask(pictures, question)).text

    return lambda question: pipe.ask(pictures, question).text, later


def langchain(url: str, pictured: bool) -> tuple[Call, Call]:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    picture = data_url() if pictured else ""
    model = ChatOpenAI(model=MODEL, base_url=url, api_key="none")

    async def later(question: str) -> str:
        return (await model.ainvoke([HumanMessage(content(question, picture))])).text

    return lambda question: model.invoke([HumanMessage(content(question, picture))]).text, later


def litellm(url: str, pictured: bool) -> tuple[Call, Call]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as library

    library.suppress_debug_info = True
    picture = data_url() if pictured else ""

    def arguments(question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": content(question, picture)}]
        return {"model": f"openai/{MODEL}", "messages": messages, "api_base": url, "api_key": "none"}

    async def later(question: str) -> str:
        return (await library.acompletion(**arguments(question))).choices[0].message.content

    return lambda question: library.completion(**arguments(question)).choices[0].message.content, later


def worker(name: str, url: str, calls: int, pictured: bool) -> None:
    """Times `calls` calls of each kind, after some that are not counted."""
    call, coming = {"openai": bare_client, "qvl": qvl, "langchain": langchain, "litellm": litellm}[name](url, pictured)

    def timed() -> list[float]:
        took = []
        for number in range(-calls // 8, calls):
            began = time.perf_counter()
            said = call(f"What colour is shoe {number}?")
            if number >= 0:
                took.append(time.perf_counter() - began)
            assert said == "ok", said
        return took

    async def timed_later() -> list[float]:
        ask: Callable[[str], Awaitable[str]] = coming
        took = []
        for number in range(-calls // 8, calls):
            began = time.perf_counter()
            said = await ask(f"What colour is shoe {number}?")
            if number >= 0:
                took.append(time.perf_counter() - began)
            assert said == "ok", said
        return took

    blocking = timed()
    told = {"blocking": statistics.median(blocking), "async": statistics.median(asyncio.run(timed_later()))}
    print(json.dumps(told), flush=True)
    # What a library would still do at the interpreter's end is none of a call's cost.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers" / "clients")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        name, url, calls, pictured = given.worker
        worker(name, url, int(calls), pictured == "picture")
        return
    from bench_cache import environment
    from bench_server import free_port, running

    peers = environment(given.peers)
    port = free_port()
    upstream = [sys.executable, str(ROOT / "benchmarks" / "bench_server.py"), "--upstream", str(port)]
    with tempfile.TemporaryDirectory() as folder, running(upstream, port, "/v1/models", Path(folder) / "log"):
        compare(given, peers, f"http://127.0.0.1:{port}/v1")


def compare(given: argparse.Namespace, peers: Path, url: str) -> None:
    """Runs every client in turn and prints the table."""
    print("| client | question | blocking ms | x bare | async ms | x bare |\n|---|---|---|---|---|---|")
    for what in ("text", "picture"):
        calls = given.calls if what == "text" else given.calls // 4
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
        for _ in range(given.rounds):
            for name in CLIENTS:
                python = sys.executable if name in QVL else str(peers)
                command = [python, __file__, "--worker", name, url, str(calls), what]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        best = {
            name: {kind: min(told[kind] for told in runs) * 1000 for kind in ("blocking", "async")}
            for name, runs in found.items()
        }
        for name, label in CLIENTS.items():
            cells = [
                f"{best[name][kind]:.2f} | {best[name][kind] / best['openai'][kind]:.2f}"
                for kind in ("blocking", "async")
            ]
            print(f"| {label} | {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
