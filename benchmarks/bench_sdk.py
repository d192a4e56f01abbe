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
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "examples" / "pictures" / "norvik-mug-red.png"
MODEL = "bench"
QVL = ("qvl", "openai", "langchain")
CLIENTS = {"openai": "openai client", "qvl": "qvl `Pipeline`", "langchain": "ChatOpenAI", "litellm": "LiteLLM SDK"}
QUESTIONS = {"text": "text", "picture": "a picture, each time another", "again": "a picture, always the same"}
Call = Callable[[str, str], Any]


def content(question: str, picture: str) -> Any:
    if not picture:
        return question
    return [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]


def data_url(number: int) -> str:
    """The picture with `number` as a comment in it, so that its bytes are those of no other."""
    data, body = PICTURE.read_bytes(), f"tEXtNumber\0{number}".encode()
    comment = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    # Behind signature and header.
    return "data:image/png;base64," + base64.b64encode(data[:33] + comment + data[33:]).decode()


def bare_client(url: str) -> tuple[Call, Call]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    coming = openai.AsyncOpenAI(base_url=url, api_key="none")

    def arguments(question: str, picture: str) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": content(question, picture)}]}

    def now(question: str, picture: str) -> str:
        return client.chat.completions.create(**arguments(question, picture)).choices[0].message.content

    async def later(question: str, picture: str) -> str:
        return (await coming.chat.completions.create(**arguments(question, picture))).choices[0].message.content

    return now, later


def qvl(url: str) -> tuple[Call, Call]:
    from qvl import AsyncPipeline, Pipeline

    pipe = Pipeline(f"openai:{MODEL}", base_url=url, cache="off", probe=False)
    coming = AsyncPipeline(f"openai:{MODEL}", base_url=url, cache="off", probe=False)

    def now(question: str, picture: str) -> str:
        return pipe.ask([picture] if picture else [], question).text

    async def later(question: str, picture: str) -> str:
        return (await coming.ask([picture] if picture else [], question)).text

    return now, later


def langchain(url: str) -> tuple[Call, Call]:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=url, api_key="none")

    def now(question: str, picture: str) -> str:
        return model.invoke([HumanMessage(content(question, picture))]).text

    async def later(question: str, picture: str) -> str:
        return (await model.ainvoke([HumanMessage(content(question, picture))])).text

    return now, later


def litellm(url: str) -> tuple[Call, Call]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as library

    library.suppress_debug_info = True

    def arguments(question: str, picture: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": content(question, picture)}]
        return {"model": f"openai/{MODEL}", "messages": messages, "api_base": url, "api_key": "none"}

    def now(question: str, picture: str) -> str:
        return library.completion(**arguments(question, picture)).choices[0].message.content

    async def later(question: str, picture: str) -> str:
        return (await library.acompletion(**arguments(question, picture))).choices[0].message.content

    return now, later


def worker(name: str, url: str, calls: int, what: str) -> None:
    """Times `calls` calls of each kind, after some that are not counted."""
    call, coming = {"openai": bare_client, "qvl": qvl, "langchain": langchain, "litellm": litellm}[name](url)
    numbers = range(-calls // 8, calls)
    pictures = {"text": lambda number: "", "picture": data_url, "again": lambda number: data_url(0)}[what]
    questions = [(number, f"What colour is shoe {number}?", pictures(number)) for number in numbers]

    def timed() -> list[float]:
        took = []
        for number, question, picture in questions:
            began = time.perf_counter()
            answered = call(question, picture)
            if number >= 0:
                took.append(time.perf_counter() - began)
            assert answered == "ok", answered
        return took

    async def timed_later() -> list[float]:
        ask: Callable[[str, str], Awaitable[str]] = coming
        took = []
        for number, question, picture in questions:
            began = time.perf_counter()
            answered = await ask(question, picture)
            if number >= 0:
                took.append(time.perf_counter() - began)
            assert answered == "ok", answered
        return took

    blocking = timed()
    title = {"blocking": statistics.median(blocking), "async": statistics.median(asyncio.run(timed_later()))}
    print(json.dumps(title), flush=True)
    # What a library would still do at the interpreter's end is none of a call's cost.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers" / "clients")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, url, calls, what = options.worker
        worker(name, url, int(calls), what)
        return
    from bench_cache import environment
    from bench_server import free_port, running

    peers = environment(options.peers)
    port = free_port()
    upstream = [sys.executable, str(ROOT / "benchmarks" / "bench_server.py"), "--upstream", str(port)]
    with tempfile.TemporaryDirectory() as folder, running(upstream, port, "/v1/models", Path(folder) / "log"):
        compare(options, peers, f"http://127.0.0.1:{port}/v1")


def compare(options: argparse.Namespace, peers: Path, url: str) -> None:
    """Runs every client in turn and prints the table."""
    print("| client | question | blocking ms | x bare | async ms | x bare |\n|---|---|---|---|---|---|")
    for what, title in QUESTIONS.items():
        calls = options.calls if what == "text" else options.calls // 4
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
        for _ in range(options.rounds):
            for name in CLIENTS:
                python = sys.executable if name in QVL else str(peers)
                command = [python, __file__, "--worker", name, url, str(calls), what]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
        best = {
            name: {kind: min(took[kind] for took in runs) * 1000 for kind in ("blocking", "async")}
            for name, runs in measured.items()
        }
        for name, label in CLIENTS.items():
            cells = [
                f"{best[name][kind]:.2f} | {best[name][kind] / best['openai'][kind]:.2f}"
                for kind in ("blocking", "async")
            ]
            print(f"| {label} | {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
