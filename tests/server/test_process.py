"""`qvl-serve` as a process: how it starts, what it prints, how it ends."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.caches.redis_server import free_port
from tests.scripted_endpoint import Echo, ScriptedEndpoint
from tests.server.conftest import data_url, question
from tests.server.processes import CHAT, remote

pytestmark = pytest.mark.slow


def test_sigterm_under_load_loses_no_answer_and_exits_0(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=0.02)] * 200)
    process = run(*remote(endpoint), "--cache", "off").wait_ready()
    text = "word " * 20
    answers: list[tuple[int, str]] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=process.address, timeout=60, trust_env=False) as client:
            for turn in range(20):
                begun = False
                body = {**question(f"{number} {turn} {text}"), "stream": True}
                try:
                    with client.stream("POST", CHAT, json=body) as answer:
                        begun = True
                        answer.read()
                except httpx.TransportError:
                    # Nobody listens any more; but what was begun is never cut.
                    assert not begun
                    return
                answers.append((answer.status_code, answer.text))

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        while len(answers) < 4:
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGTERM)
        for one in asked:
            one.result()
    assert process.popen.wait(60) == 0
    for status, body in answers:
        assert (status == 200 and body.endswith("data: [DONE]\n\n")) or status == 503, body[-300:]
    # Whatever reached the model was answered.
    assert len([status for status, _ in answers if status == 200]) == len(endpoint.chats)


def test_a_second_sigterm_ends_at_once(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=2.0)] * 5)
    process = run(*remote(endpoint), "--cache", "off").wait_ready()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: process.post(question("word " * 50)))
        while not endpoint.chats:
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGTERM)
        while httpx.get(process.address + "/ready", trust_env=False).status_code == 200:
            time.sleep(0.01)
        assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGTERM)
        # Less than the answer would take.
        assert process.popen.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(httpx.HTTPError):
            asked.result()


def test_killed_and_started_again_on_the_same_cache(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    cache = ["--cache", f"sqlite:///{tmp_path / 'answers.db'}"]
    first = run(*remote(endpoint), *cache).wait_ready()
    body = question("remember me", data_url("red"))
    told = first.post(body)
    assert told.headers["x-qvl-cache"] == "miss"
    first.popen.kill()
    first.popen.wait(10)
    again = run(*remote(endpoint), *cache).wait_ready().post(body)
    assert again.headers["x-qvl-cache"] == "hit"
    assert again.json()["choices"] == told.json()["choices"]


def test_the_log_has_one_json_line_a_request_and_no_secrets(run, endpoint: ScriptedEndpoint) -> None:
    process = run(*remote(endpoint), "--api-key", "sesame", "--cache", "memory:").wait_ready()
    httpx.post(
        process.address + CHAT,
        json=question("a secret prompt", data_url()),
        headers={"Authorization": "Bearer sesame", "X-Request-Id": "shop-1"},
        timeout=60,
        trust_env=False,
    )
    process.popen.send_signal(signal.SIGTERM)
    assert process.ended(60) == 0
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == 1
    line = requests[0]
    assert (line["request_id"], line["status"], line["cache"], line["pictures"]) == ("shop-1", 200, "miss", 1)
    assert line["prompt_tokens"] > 0
    everything = "\n".join(process.lines)
    assert "sesame" not in everything
    assert "secret prompt" not in everything
    assert [chat.headers.get("x-request-id") for chat in endpoint.chats][-1] == "shop-1"


def test_keys_are_reloaded_by_sighup(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    process = run(*remote(endpoint), "--api-key-file", str(file)).wait_ready()

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(process.address + "/v1/models", headers=headers, trust_env=False).status_code

    assert (status("old"), status("new")) == (200, 401)
    file.write_text("new\n")
    process.popen.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while status("new") != 200:
        assert time.monotonic() < end
    assert status("old") == 401


def failed(run, *args: str, **env: str) -> str:
    """The one line with which a start ends."""
    process = run(*args, **env)
    assert process.ended(250) != 0
    said = [line for line in process.lines if line and not line.startswith("{")]
    assert "Traceback" not in "\n".join(process.lines)
    assert not any("cannot be opened" in line for line in process.lines), "the log tells it too"
    assert len([line for line in said if "no model named" not in line and not line.startswith("loading ")]) == 1, said
    return said[-1]


def test_what_cannot_start_says_why_in_one_line(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = failed(run, *remote(endpoint), "--port", str(taken.getsockname()[1]))
    assert "in use" in line
    assert "--port" in line
    assert "allow-unauthenticated" in failed(run, *remote(endpoint), "--host", "0.0.0.0")
    assert "nowhere" in failed(run, str(tmp_path / "nowhere"))
    assert "unknown backend" in failed(run, "opanai:x")
    assert "one key a line" in failed(run, *remote(endpoint), "--api-key-file", str(tmp_path / "none"))
    assert "npu" in failed(run, DEVICE="npu")
    assert "nowhere" in failed(run, MODEL_PATH=str(tmp_path / "nowhere"))


def test_settings_come_from_the_environment_and_the_config_file(run, endpoint, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[serve]\nserved-model-name = ["from-file"]\nmax-queue = 7\n')
    process = run(
        QVL_CONFIG=str(config), QVL_MODEL="openai:echo", QVL_BASE_URL=endpoint.url, SERVER_HOST="127.0.0.1"
    ).wait_ready()
    found = httpx.get(process.address + "/v1/models", trust_env=False).json()
    assert [model["id"] for model in found["data"]] == ["from-file"]


def test_the_limit_on_decoding_is_raised_as_its_error_says(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    body = question("how large", data_url("red", (1024, 1024)))
    refused = run(*remote(endpoint), QVL_MAX_DECODE_MB="1").wait_ready().post(body)
    assert refused.status_code == 400
    assert "--max-decode-mb" in refused.json()["error"]["message"]
    assert run(*remote(endpoint), "--max-decode-mb", "5", QVL_MAX_DECODE_MB="1").wait_ready().post(body).is_success
    config = tmp_path / "config.toml"
    config.write_text("[serve]\nmax-decode-mb = 1\n")
    assert run(*remote(endpoint), QVL_CONFIG=str(config)).wait_ready().post(body).status_code == 400
    config.write_text("[serve]\nmax-decode-mb = 5\n")
    assert run(*remote(endpoint), QVL_CONFIG=str(config)).wait_ready().post(body).is_success
    wrong = run(*remote(endpoint), "--max-decode-mb", "0")
    assert wrong.ended(60) == 2
    assert any("--max-decode-mb" in line for line in wrong.lines)


def test_the_variables_of_older_scripts_are_honoured(run, endpoint: ScriptedEndpoint) -> None:
    port = str(free_port())
    process = run(
        "--option",
        "probe=false",
        MODEL_PATH="openai:echo",
        MODEL_ID="shop/Qwen3-VL, large",
        QVL_BASE_URL=endpoint.url,
        SERVER_HOST="127.0.0.1",
        SERVER_PORT=port,
        MAX_IMAGE_PIXELS="4096",
    ).wait_ready()
    assert process.address == f"http://127.0.0.1:{port}"
    found = httpx.get(process.address + "/v1/models", trust_env=False).json()
    assert [model["id"] for model in found["data"]] == ["shop/Qwen3-VL, large"]
    answer = process.post({**question("how large", data_url("red", (256, 256))), "model": "shop/Qwen3-VL, large"})
    assert answer.json()["choices"][0]["message"]["content"] == "red 64x64, how large"


def test_it_says_that_it_loads_and_then_what_it_is_and_how_to_call_it(run, endpoint: ScriptedEndpoint) -> None:
    process = run(*remote(endpoint), "--cache", "memory:", "--served-model-name", "shop-vl").wait_ready()
    call = process.wait_for("  try").partition("try")[2].strip()
    said = [line for line in process.lines if not line.startswith("{")]
    assert said[0] == f"loading shop-vl; {process.address}/ready tells when it is done"
    told = dict(line.split(maxsplit=1) for line in said if line.startswith("  "))
    assert (told["backend"], told["model"], told["cache"]) == ("openai", "shop-vl", "memory:")
    assert said.index(f"  address  {process.address}") > 0
    # The line that it suggests is run as it stands.
    done = subprocess.run(["bash", "-c", call.replace("curl ", "curl -sS --fail ", 1)], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "Hello"


def test_help_is_in_groups() -> None:
    command = [sys.executable, "-m", "qvl.cli.serve", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}).stdout
    groups = ("Model", "Address", "Cache", "Security", "Load", "Pictures", "Logs")
    places = [said.find(f"─ {group} ─") for group in groups]
    assert -1 not in places
    assert places == sorted(places)


def test_spans_go_to_a_collector(run, endpoint: ScriptedEndpoint) -> None:
    """By OpenTelemetry's own variable, over HTTP, and all of them before the process ends."""
    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{collector.server_address[1]}"
    process = run(*remote(endpoint), OTEL_EXPORTER_OTLP_ENDPOINT=address).wait_ready()
    assert process.post(question("a secret prompt")).status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(60) == 0
    collector.shutdown()
    collector.server_close()
    assert [path for path, _ in got] == ["/v1/traces"]
    sent = got[0][1]
    for word in (b"gen_ai.usage.input_tokens", b"service.name", b"chat echo"):
        assert word in sent
    assert b"secret" not in sent
    assert "traceparent" in endpoint.chats[-1].headers
    line = failed(run, *remote(endpoint), "--otlp-traces-endpoint", "collector")
    assert "invalid --otlp-traces-endpoint" in line


def test_the_bundled_model_answers_about_a_picture(run, tmp_path: Path) -> None:
    """No name, no network: the page's own example."""
    pictures = sorted((Path(__file__).parents[2] / "examples" / "pictures").glob("*-*-*.*"))
    if not pictures:
        pytest.skip("no example pictures here")
    process = run("--cache", f"sqlite:///{tmp_path / 'c.db'}").wait_ready()
    name, category, colour = pictures[0].stem.split("-")
    kind = {".jpg": "jpeg"}.get(pictures[0].suffix, pictures[0].suffix[1:])
    answer = httpx.post(
        process.address + "/v1/analyze",
        content=pictures[0].read_bytes(),
        headers={"Content-Type": f"image/{kind}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()["analysis"]
    assert found["brand"].lower() == name
    assert found["category"].lower() == category
    assert colour in json.dumps(found["attributes"]).lower()
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_a_server_starts_before_its_engines_and_is_ready_when_one_is(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.stop()
    process = run("openai:echo", "--base-url", endpoint.url, "--base-url", "http://127.0.0.1:1/v1", "--cache", "off")
    said = process.wait_for("qvl-serve: waiting for an engine: ")
    assert str(endpoint.port) in said
    assert "127.0.0.1:1" in said
    process.address = process.wait_for("loading ").split()[2].removesuffix("/ready")
    ready = process.get("/ready")
    assert ready.status_code == 503
    assert "no engine answers yet" in ready.text
    refused = process.post({"messages": [{"role": "user", "content": "a"}]})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert process.get("/health").status_code == 200
    endpoint.start()
    process.wait_ready()
    assert process.get("/ready").status_code == 200
    assert process.post({"messages": [{"role": "user", "content": "a"}]}).status_code == 200
    assert len([line for line in process.lines if line.startswith("qvl-serve: waiting")]) == 1
    process.popen.terminate()
    assert process.ended(30) == 0


def test_a_server_that_waits_for_its_engines_ends_when_told(run) -> None:
    process = run("openai:echo", "--base-url", "http://127.0.0.1:1/v1", "--cache", "off")
    process.wait_for("qvl-serve: waiting for an engine: ")
    process.popen.terminate()
    assert process.ended(30) == 0
    assert not any("Traceback" in line for line in process.lines)
