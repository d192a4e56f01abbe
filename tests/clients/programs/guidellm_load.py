"""guidellm puts load on the server: streamed questions about a picture."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import BRAND, DATA_URL, MODEL, QUESTION, URL, run

COUNT = 6


def load(**columns):
    """Return what guidellm found of COUNT requests, one for each row of `columns`."""
    folder = Path(tempfile.mkdtemp())
    rows, report = folder / "rows.jsonl", folder / "report.json"
    rows.write_text("".join(json.dumps(columns) + "\n" for _ in range(COUNT)))
    arguments = {
        "backend": f"kind=openai_http,target={URL},model={MODEL}",
        "profile": "kind=concurrent,streams=2",
        "constraint": f"kind=max_requests,count={COUNT}",
        "data": f"kind=json_file,path={rows}",
        "output": f"kind=json,path={report}",
    }
    line = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
    line += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = json.loads(report.read_text())["benchmarks"]
    return told["requests"]


def text():
    told = load(prompt=QUESTION)
    assert (len(told["successful"]), len(told["errored"])) == (COUNT, 0), told


def picture():
    told = load(prompt=QUESTION, image=DATA_URL)
    assert [request["output"] for request in told["successful"]] == [BRAND] * COUNT, told


def stream():
    for request in load(prompt=QUESTION, image=DATA_URL)["successful"]:
        assert request["time_to_first_token_ms"] > 0, request


run("guidellm", text=text, picture=picture, stream=stream)
