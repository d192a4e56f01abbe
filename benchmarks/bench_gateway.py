"""Pictures through gateways: `qvl-serve` (1 and 2 workers), LiteLLM's proxy, Portkey, vllm-router, sglang-router.

    python benchmarks/bench_gateway.py [--quick] [--rounds N] [--only NAME ...] [--sizes SIZE ...] [--json FILE]

Bodies of 3 KB, 64 KB, 512 KB and 2 MB with a picture in each, at 1, 16 and 64 clients, in front of the same trivial
upstream. Every picture of a run is new to the gateway (a server that keeps what it saw must forget it before it comes
again), except in the rows "known pictures". All ask the same question, as one does of a catalogue, except in the rows
"new questions". Needs `wrk`, and `npm` for Portkey. The others are installed from their
registries into virtual environments of their own. Requests for each second of CPU time of the whole gateway, which
other work on the machine disturbs less, stand beside requests by the clock; times are those added to the upstream's.
They are measured in turns; in the table the middle round counts, in the comparison the mean ratio of all rounds, which
has its standard error beside it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_server import free_port, litellm_command, running
from PIL import Image

SIZES = {"3 KB": 3 * 1024, "64 KB": 64 * 1024, "512 KB": 512 * 1024, "2 MB": 2 * 1024 * 1024}
CLIENTS = (1, 16, 64)
# More than any of them keeps of what it saw.
ROTATION = 24 * 2**20
KNOWN = 4
KNOWN_PICTURES = ", known pictures"
NEW_QUESTIONS = ", new questions"
CHAT = "/v1/chat/completions"
MISSING = {
    "Bifrost": "its npm package has no binary: it downloads one when it is started",
    "LiteLLM's Rust gateway": "in no package of the registries; the wheel of litellm is Python",
    "TensorZero": "its package is a client; the gateway comes as a container image alone",
}
SCRIPT = """
local requests, at = {}, 0
function init()
  for body in io.lines(os.getenv("BODIES")) do requests[#requests + 1] = wrk.format("POST", nil, nil, body) end
end
function request() at = at % #requests + 1 return requests[at] end
"""


@dataclass
class Gateway:
    """What is started: a command for a port, the path that answers when it is ready, and headers of its own."""

    name: str
    command: Callable[[int], list[str]]
    ready: str
    headers: dict[str, str]


@dataclass
class Cell:
    """The middle one of several measurements, times in ms, and the requests for each CPU second of all in order."""

    gateway: str
    size: str
    clients: int
    rate: float
    p50: float
    p99: float
    per_cpu_second: float
    errors: int
    rounds: list[float]


def picture(size: int) -> bytes:
    """A photograph-like JPEG of about `size` bytes."""
    # Below the pixels at which qvl would scale it, as a client does that knows the model.
    edge = min(1600, max(32, int((size / 0.55) ** 0.5) // 8 * 8))
    noise = Image.effect_noise((edge // 4, edge // 4), 90).resize((edge, edge), Image.Resampling.BICUBIC)
    image = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    data = b""
    for quality in (10, 30, 50, 70, 80, 90, 94, 96, 98, 100):
        held = io.BytesIO()
        image.save(held, "JPEG", quality=quality)
        data = held.getvalue()
        if len(data) >= size:
            break
    return data


def bodies(path: Path, size: int, count: int, *, question: str = "What colour is the shoe?") -> None:
    """Write `count` request bodies of about `size` bytes, a line each, all with different pictures.

    A `{}` in the question becomes the number of the body.
    """
    plain = picture((size - 200) * 3 // 4)
    with path.open("wb") as file:
        for number in range(count):
            # A comment makes other bytes of the same picture; long enough that a sample of the bytes differs too.
            text = hashlib.sha256(b"%d" % number).hexdigest().encode() * (len(plain) // 3000 + 1)
            comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
            url = "data:image/jpeg;base64," + base64.b64encode(plain[:2] + comment + plain[2:]).decode()
            parts = [
                {"type": "text", "text": question.format(number)},
                {"type": "image_url", "image_url": {"url": url}},
            ]
            body = {"model": "bench", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
            file.write(json.dumps(body).encode() + b"\n")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all below it, those that ended included (Linux)."""
    parents: dict[int, list[int]] = {}
    times: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
        times[int(folder.name)] = sum(map(int, fields[11:15]))
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        total += times.get(one, 0)
        waiting += parents.get(one, [])
    return total / os.sysconf("SC_CLK_TCK")


def measure(port: int, pid: int, clients: int, seconds: int, file: Path, headers: dict[str, str]) -> dict[str, float]:
    before = cpu_seconds(pid)
    url = f"http://127.0.0.1:{port}{CHAT}"
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "--latency"]
    for name, text in {"Content-Type": "application/json", **headers}.items():
        command += ["-H", f"{name}: {text}"]
    script = file.parent / "post.lua"
    script.write_text(SCRIPT)
    environment = {**os.environ, "BODIES": str(file)}
    output = subprocess.run(
        [*command, "-s", str(script), url], capture_output=True, text=True, check=True, env=environment
    ).stdout
    used = cpu_seconds(pid) - before
    count = int(re.search(r"(\d+) requests in", output)[1])
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
    rank = {p: float(v) * units[u] for p, v, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s|m)\b", output)}
    return {
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1]),
        "p50": rank.get("50", 0.0),
        "p99": rank.get("99", 0.0),
        "per_cpu_second": count / max(used, 0.01),
        "errors": int(bad[1]) if bad else 0,
    }


def gateways(tools: Path, upstream: int, work: Path) -> Iterator[Gateway | str]:
    """Yield each gateway, or why it is not there."""
    base = f"http://127.0.0.1:{upstream}"
    qvl = [sys.executable, "-m", "qvl.cli.serve", "openai:bench", "--base-url", f"{base}/v1", "--cache", "off"]
    # The trivial upstream would fail a probe of what it can do.
    qvl += ["--option", "probe=false", "--no-canary", "--log-level", "warning"]
    for workers in (1, 2):
        name = f"qvl-serve, {workers} worker{'s' * (workers > 1)}"
        yield Gateway(name, lambda port, w=workers: [*qvl, "--workers", str(w), "--port", str(port)], "/ready", {})
    try:
        yield Gateway(
            "LiteLLM proxy",
            lambda port: litellm_command(tools / "litellm", upstream, port, work),
            "/health/liveliness",
            {},
        )
    except subprocess.CalledProcessError as exc:
        yield f"LiteLLM proxy: {exc}"
    npm = tools / "portkey"
    if shutil.which("npm") is None:
        yield "Portkey: no npm here"
    else:
        server = npm / "node_modules/@portkey-ai/gateway/build/start-server.js"
        if not server.exists():
            npm.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "install", "--prefix", str(npm), "@portkey-ai/gateway"], check=True)
        headers = {
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"{base}/v1",
            "Authorization": "Bearer none",
        }
        yield Gateway("Portkey", lambda port: ["node", str(server), f"--port={port}", "--headless"], "/", headers)
    for name in ("vllm-router", "sglang-router"):
        folder = tools / "routers"
        if not (folder / "bin" / name).exists():
            if not folder.exists():
                venv.create(folder, with_pip=True)
            installing = subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", name])
            if installing.returncode:
                yield f"{name}: no wheel for this machine"
                continue
        command = [str(folder / "bin" / name), *(["launch"] if name == "sglang-router" else [])]
        command += ["--worker-urls", base, "--host", "127.0.0.1", "--policy", "round_robin"]
        yield Gateway(
            name,
            lambda port, c=tuple(command): [*c, "--port", str(port), "--prometheus-port", str(free_port())],
            "/health",
            {},
        )


def table(cells: list[Cell]) -> str:
    """The measurements as a table; times are those added to the upstream's."""
    direct = {(cell.size, cell.clients): cell for cell in cells if cell.gateway == "nothing"}
    lines = [
        "| body | clients | gateway | requests/s | per CPU second | added p50 ms | added p99 ms | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in dict.fromkeys(cell.size for cell in cells):
        for clients in dict.fromkeys(cell.clients for cell in cells):
            for cell in cells:
                if (cell.size, cell.clients) != (size, clients):
                    continue
                if not cell.rate:
                    lines.append(f"| {size} | {clients} | {cell.gateway} | no answer in time | | | | |")
                    continue
                alone = direct[size, clients]
                added = ("", "") if cell is alone else (f"{cell.p50 - alone.p50:.1f}", f"{cell.p99 - alone.p99:.1f}")
                core = "" if cell is alone else f"{cell.per_cpu_second:.0f}"
                figures = f"{cell.rate:.0f} | {core} | {added[0]} | {added[1]} | {cell.errors or ''}"
                lines.append(f"| {size} | {clients} | {cell.gateway} | {figures} |")
    return "\n".join(lines)


def verdict(cells: list[Cell]) -> str:
    """Requests for a core of qvl-serve by those of each other gateway, at the most clients."""
    most = max(cell.clients for cell in cells)
    by_name = {(cell.gateway, cell.size): cell for cell in cells if cell.clients == most and not cell.errors}
    others = [name for name in dict.fromkeys(cell.gateway for cell in cells) if not name.startswith(("qvl", "nothing"))]
    lines = [f"qvl-serve (1 worker) / gateway, requests per CPU second at {most} clients:"]
    for size in dict.fromkeys(cell.size for cell in cells):
        for kind in ("", KNOWN_PICTURES, NEW_QUESTIONS):
            own = by_name.get((f"qvl-serve, 1 worker{kind}", size))
            ratios = [
                f"{name} {times(own, other)}"
                for name in others
                if own is not None and (other := by_name.get((name, size))) is not None and other.per_cpu_second
            ]
            if ratios:
                lines.append(f"  {size}{kind or ', new pictures'}: {', '.join(ratios)}")
    return "\n".join(lines)


def times(own: Cell, other: Cell) -> str:
    """The geometric mean of the ratios of all rounds, with its standard error if there are several."""
    logs = [math.log(a / b) for a, b in zip(own.rounds, other.rounds, strict=True)]
    mean = math.exp(statistics.mean(logs))
    if len(logs) == 1:
        return f"{mean:.2f} x"
    return f"{mean:.2f} x (+-{mean * statistics.stdev(logs) / math.sqrt(len(logs)):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two seconds each and 16 clients alone: about 4 minutes")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each cell (default 1)")
    parser.add_argument("--only", nargs="*", help="gateways whose names contain one of these")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="bodies of these sizes alone")
    parser.add_argument("--tools", type=Path, default=Path(tempfile.gettempdir()) / "qvl-bench-gateways")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("bench_gateway needs wrk: apt-get install wrk")
    seconds, clients = (2, (16,)) if arguments.quick else (arguments.seconds, CLIENTS)
    with tempfile.TemporaryDirectory() as name:
        cells = compare(Path(name), arguments, seconds, clients)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    print(table(cells))
    print(verdict(cells))
    for name, reason in MISSING.items():
        print(f"not measured: {name}: {reason}")


def compare(work: Path, arguments: argparse.Namespace, seconds: int, clients: tuple[int, ...]) -> list[Cell]:
    """Start every gateway, and measure them in turns: what else the machine does meanwhile disturbs all alike."""
    files = {}
    for number, (size, length) in enumerate(SIZES.items()):
        files[size, ""] = work / f"new-{number}.jsonl"
        bodies(files[size, ""], length, ROTATION // length + 1)
        files[size, KNOWN_PICTURES] = work / f"known-{number}.jsonl"
        bodies(files[size, KNOWN_PICTURES], length, KNOWN)
        files[size, NEW_QUESTIONS] = work / f"asked-{number}.jsonl"
        bodies(files[size, NEW_QUESTIONS], length, ROTATION // length + 1, question="What colour is shoe {}?")
    upstream = free_port()
    this = [sys.executable, str(Path(__file__).with_name("bench_server.py")), "--upstream", str(upstream)]
    with ExitStack() as started:
        process = started.enter_context(running(this, upstream, "/v1/models", work / "upstream.log"))
        measured = [("nothing", "", upstream, process.pid, {})]
        for found in gateways(arguments.tools, upstream, work):
            if isinstance(found, str):
                print(f"not measured: {found}", file=sys.stderr)
                continue
            if arguments.only and not any(part in found.name for part in arguments.only):
                continue
            port = free_port()
            try:
                process = started.enter_context(
                    running(found.command(port), port, found.ready, work / f"{len(measured)}.log")
                )
            except SystemExit as exc:
                print(f"not measured: {found.name}: {exc}", file=sys.stderr)
                continue
            kinds = ("", KNOWN_PICTURES, NEW_QUESTIONS) if found.name == "qvl-serve, 1 worker" else ("",)
            measured += [(found.name, kind, port, process.pid, found.headers) for kind in kinds]
        cells = []
        for size in arguments.sizes:
            for _, _kind, port, pid, headers in measured:
                measure(port, pid, 4, 1, files[size, KNOWN_PICTURES], headers)
            for count in clients:
                rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
                for number in range(arguments.rounds):
                    for name, kind, port, pid, headers in measured[:: -1 if number % 2 else 1]:
                        figures = measure(port, pid, count, seconds, files[size, kind], headers)
                        rounds.setdefault((name, kind), []).append(figures)
                for name, kind, *_ in measured:
                    cells.append(middle(name + kind, size, count, rounds[name, kind]))
                    print(f"{name}{kind}, {size}, {count} clients: {cells[-1].rate:.0f}/s", file=sys.stderr, flush=True)
    return cells


def middle(name: str, size: str, clients: int, rounds: list[dict[str, float]]) -> Cell:
    """The round in the middle by processor time, with the errors of all."""
    figures = sorted(rounds, key=lambda one: one["per_cpu_second"])[len(rounds) // 2]
    errors, all_rounds = sum(int(one["errors"]) for one in rounds), [one["per_cpu_second"] for one in rounds]
    return Cell(name, size, clients, **{**figures, "errors": errors}, rounds=all_rounds)


if __name__ == "__main__":
    main()
