"""Effect of one oversized prompt on other requests: python benchmarks/bench_hurtful_prompts.py PID http://127.0.0.1:8000

Sends each prompt to a `qvl-serve` over the bundled model and prints a row of the table in README.md: the time of the
request, the longest that /health took meanwhile, and how much the highest memory of process PID grew.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

PROMPTS = {
    "one letter": "a" * 20_000_000,
    "spaces": " " * 20_000_000,
    "two letters in turn": "ab" * 5_000_000,
    "combining marks": "\u0301" * 4_000_000,
}


def highest_memory(pid: str) -> int:
    """Bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def ask(url: str, body: bytes) -> int:
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def main(pid: str, url: str) -> None:
    print("| request | size | answer | worst /health | time | memory |\n|---|---|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        body = json.dumps({"messages": [{"role": "user", "content": prompt}], "max_tokens": 8}).encode()
        before, began, worst, status = highest_memory(pid), time.monotonic(), 0.0, []
        thread = threading.Thread(target=lambda body=body, status=status: status.append(ask(url, body)))
        thread.start()
        while thread.is_alive():
            sent_at = time.monotonic()
            urllib.request.urlopen(f"{url}/health", timeout=120).read()
            worst = max(worst, time.monotonic() - sent_at)
            thread.join(0.01)
        took, grown = time.monotonic() - began, (highest_memory(pid) - before) / 1e6
        print(f"| {name} | {len(body) / 1e6:.0f} MB | {status[0]} | {worst:.2f} s | {took:.2f} s | +{grown:.0f} MB |")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].rstrip("/"))
