"""Comparison on one checkpoint: `qvl-serve`, plain generate, `transformers serve`, vLLM, OpenVINO and llama.cpp.

Builds a Qwen3-VL of random weights and the peers' environments where they are missing (build/), starts each server
afresh for each measurement, drives it with streamed requests over HTTP (448 x 448 pictures, each its own, 64 tokens),
and prints one table. Each of N clients sends its next request when its last answer is complete. "Same picture" asks
about four pictures twice, alone, with different questions, and compares the times to the first token.

`--server NAME=URL` adds a server that runs already on the checkpoint; with it `--peers` may be left empty.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine_checkpoint import write
from bench_engine_peers import PEERS, processor_seconds
from PIL import Image

from qvl.bench.exchange import AttemptFailedError, LoadedEndpoint
from qvl.bench.timed_answer import TimedAnswer
from qvl.errors import first_line

FIRST = "Describe this picture in detail."
SECOND = "Another question about the very same picture: which brand is on it?"
# Requests of each client. One server takes minutes for the 2,048 tokens at 32 clients, so that is all of them.
ROUNDS = {1: 3, 8: 1, 32: 1}


def quantile(values: Iterable[float], share: float) -> float:
    """By the nearest rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def png(seed: int, edge: int) -> str:
    """A picture of its own for each seed, as a data URL."""
    noise = np.random.default_rng(seed).integers(0, 255, (edge // 16, edge // 16, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize((edge, edge)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@dataclass
class Client:
    """Sends requests to one server and keeps when everything came."""

    endpoint: LoadedEndpoint
    extras: Mapping[str, object]
    edge: int

    async def ask(self, seed: int, question: str, tokens: int) -> tuple[float, TimedAnswer]:
        """(when it was sent, the answer)."""
        picture = {"type": "image_url", "image_url": {"url": png(seed, self.edge)}}
        content = [picture, {"type": "text", "text": question}]
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extras,
        }
        data = json.dumps(body).encode()
        sent = time.perf_counter()
        try:
            return sent, await self.endpoint.ask(data, f"bench-{seed}")
        except AttemptFailedError as exc:
            # llama.cpp's server closes connections that it kept open.
            if exc.kind != "connect":
                raise
        sent = time.perf_counter()
        return sent, await self.endpoint.ask(data, f"bench-{seed}")

    async def warm_up(self) -> None:
        """Compiles, loads and fills what is made on first use: alone, then four at once."""
        await self.ask(1, "Warm up.", 8)
        await asyncio.gather(*(self.ask(2 + index, "Warm up.", 8) for index in range(4)))


@dataclass
class Cell:
    """What N clients measured. Seconds."""

    clients: int
    seconds: float
    tokens: int
    requests: int
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    processor: float = float("nan")

    def figures(self) -> dict[str, float]:
        return {
            "clients": self.clients,
            "requests": self.requests,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_p50": quantile(self.first, 0.5),
            "ttft_p95": quantile(self.first, 0.95),
            "itl_p50": quantile(self.gaps, 0.5),
            "itl_p95": quantile(self.gaps, 0.95),
            "processor_ms_per_token": 1e3 * self.processor / self.tokens,
        }


async def closed_loop(client: Client, clients: int, rounds: int, tokens: int) -> Cell:
    cell = Cell(clients, 0.0, 0, clients * rounds)

    async def one(number: int) -> None:
        for turn in range(rounds):
            sent, answer = await client.ask(1000 * clients + 100 * turn + number, FIRST, tokens)
            # Delivered tokens: a server that stops early or loses text is not credited with what was asked for.
            cell.tokens += answer.usage.completion_tokens if answer.usage else answer.pieces
            cell.first.append((answer.first or answer.end) - sent)
            cell.gaps += answer.gaps

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    cell.seconds = time.perf_counter() - began
    return cell


async def same_picture(client: Client, pictures: int = 4) -> dict[str, float]:
    """Time to the first token about a new picture, and of another question about it."""
    cold, warm = [], []
    for seed in range(pictures):
        for question, times in ((FIRST, cold), (SECOND, warm)):
            sent, answer = await client.ask(500_000 + seed, question, 4)
            times.append((answer.first or answer.end) - sent)
    measured = {"cold_ttft": quantile(cold, 0.5), "warm_ttft": quantile(warm, 0.5)}
    return {**measured, "warm_to_cold": measured["warm_ttft"] / measured["cold_ttft"]}


async def measure(
    url: str, group: int | None, model: str | None, extras: Mapping[str, object], arguments: Any, what: int
) -> dict[str, float]:
    """One measurement of one server: `what` clients, or "same picture" for 0."""
    client = Client(LoadedEndpoint(url, model=model, timeout=900), extras, arguments.edge)
    try:
        await client.endpoint.find_model()
        await client.warm_up()
        if not what:
            return await same_picture(client)
        before = processor_seconds(group)
        cell = await closed_loop(client, what, ROUNDS.get(what, 1), arguments.tokens)
        cell.processor = processor_seconds(group) - before
        return cell.figures()
    finally:
        client.endpoint.close()


def table(rows: list[dict[str, Any]], ours: str = "qvl") -> str:
    """The rows as markdown, with what `ours` does for each token that the others do."""
    rows = medians(rows)
    names = list(dict.fromkeys(row["server"] for row in rows))
    lines = [
        "| clients | server | dtype | tokens/s | first token p50 / p95 | between tokens p50 / p95 | processor time "
        "a token | qvl is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    loads = [row for row in rows if "clients" in row]
    for clients in dict.fromkeys(row["clients"] for row in loads):
        cells = [row for row in loads if row["clients"] == clients]
        mine = next((row["tokens_per_s"] for row in cells if row["server"] == ours), None)
        for row in sorted(cells, key=lambda row: names.index(row["server"])):
            ratio = f"{mine / row['tokens_per_s']:.2f} x" if mine and row["server"] != ours else ""
            lines.append(
                f"| {clients} | {row['server']} | {row['dtype']} | {row['tokens_per_s']:.1f} | {row['ttft_p50']:.2f} / "
                f"{row['ttft_p95']:.2f} s | {row['itl_p50'] * 1e3:.0f} / {row['itl_p95'] * 1e3:.0f} ms | "
                f"{row.get('processor_ms_per_token', float('nan')):.0f} ms | {ratio} |"
            )
    same = [row for row in rows if "warm_to_cold" in row]
    if same:
        lines += [
            "",
            "| same picture, new question | dtype | first token, new picture | first token, known picture | ratio |",
            "|---|---|---|---|---|",
        ]
    lines += [
        f"| {row['server']} | {row['dtype']} | {row['cold_ttft']:.3f} s | {row['warm_ttft']:.3f} s | "
        f"{row['warm_to_cold']:.2f} |"
        for row in same
    ]
    return "\n".join(lines)


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each server, dtype and load: the middle one of several by tokens/s, or by the ratio."""
    measured: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        measured.setdefault((row["server"], row["dtype"], row.get("clients", 0)), []).append(row)
    middle = []
    for same in measured.values():
        by = "tokens_per_s" if "clients" in same[0] else "warm_to_cold"
        middle.append(sorted(same, key=lambda row: row[by])[len(same) // 2])
    return middle


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="0: same picture, new question")
    parser.add_argument("--dtype", default="auto", help="of all servers; auto: what qvl chooses on this device")
    parser.add_argument("--family", choices=("qwen3_vl", "qwen3_5"), default="qwen3_vl", help="of the random weights")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--edge", type=int, default=448)
    parser.add_argument("--no-same-picture", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/bench-engine"), help="folder for JSON, table and logs")
    parser.add_argument("--add", action="store_true", help="to the rows of earlier runs in --out")
    parser.add_argument("--repeat", type=int, default=1, help="times to measure everything; the table has the medians")
    arguments = parser.parse_args()
    # A server must not outlive this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "bench-130m" if arguments.family == "qwen3_vl" else f"bench-130m-{arguments.family}"
    checkpoint = write(Path("build") / name, family=arguments.family).resolve()
    dtype = chosen_dtype(arguments.dtype)
    kept = arguments.out / "engine.json"
    earlier = json.loads(kept.read_text(encoding="utf-8")) if arguments.add and kept.is_file() else {}
    report: dict[str, Any] = {"machine": machine(), "versions": earlier.get("versions", {}), "rows": []}
    rows = report["rows"] = earlier.get("rows", [])
    running = dict(server.split("=", 1) for server in arguments.server)
    absent: dict[str, str] = {}
    for name in arguments.peers:
        try:
            report["versions"][name] = PEERS[name].version()
            print(report["versions"][name], file=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as exc:
            absent[name] = first_line(exc)
            print(f"{name} could not be had: {absent[name]}", file=sys.stderr)
    names = [*(name for name in arguments.peers if name not in absent), *running]
    # All servers at one load before the next load: what else the machine does changes little within minutes.
    jobs = [*arguments.clients, *([] if arguments.no_same_picture else [0])]
    for what, _, name in itertools.product(jobs, range(arguments.repeat), names):
        peer = PEERS.get(name)
        if peer is not None:
            opened: AbstractContextManager[tuple[str, int | None]] = peer.running(
                checkpoint, dtype, arguments.out / f"{name}.log"
            )
        else:
            opened = nullcontext((running[name], None))
        with opened as (url, group):
            model = str(checkpoint) if name == "transformers serve" else None
            measured = asyncio.run(measure(url, group, model, peer.extras if peer else {}, arguments, what))
        rows.append({"server": name, "dtype": dtype, **measured})
        rounded = {key: round(value, 3) for key, value in measured.items()}
        print(f"{name}, {what or 'same picture'}: {rounded}", file=sys.stderr)
        kept.write_text(json.dumps(report, indent=1), encoding="utf-8")
    lines = [table(rows), *(f"\n{name} could not be had: {reason}" for name, reason in absent.items())]
    (arguments.out / "engine.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def chosen_dtype(dtype: str) -> str:
    from qvl.backends.local.model.device import open_device

    return open_device("cpu", dtype).dtype_name


if __name__ == "__main__":
    main()
