"""`qvl-serve` as a process: how it starts, what it prints, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from qvl.testing.endpoint import Echo, ScriptedEndpoint
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
    assert process.popen.wait(20) == 0
    for status, body in answers:
        assert (status == 200 and body.endswith("data: [DONE]\n\n")) or status == 503, body[-300:]
    # Whatever reached the model was answered.
    assert len([status for status, _ in answers if status == 200]) == len(endpoint.chats)


def test_a_second_sigterm_ends_at_once(run, endpoint: ScriptedEndpoint) -> None:
    endpoint.say(*[Echo(pause=1.0)] * 5)
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
        assert process.popen.wait(5) == 128 + signal.SIGTERM
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
    assert process.popen.wait(20) == 0
    time.sleep(0.2)
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
    end = time.monotonic() + 10
    while status("new") != 200:
        assert time.monotonic() < end
    assert status("old") == 401


def failed(run, *args: str, **env: str) -> str:
    """The one line with which a start ends."""
    process = run(*args, **env)
    assert process.popen.wait(60) not in (0, None)
    time.sleep(0.2)
    said = [line for line in process.lines if line and not line.startswith("{")]
    assert "Traceback" not in "\n".join(process.lines)
    assert len([line for line in said if "no model named" not in line and not line.startswith("loading ")]) == 1, said
    return said[-1]


def test_what_cannot_start_says_why_in_one_line(run, endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = failed(run, *remote(endpoint), "--port", str(taken.getsockname()[1]))
    assert "in use" in line
    assert "--port" in line
    assert "allow-unauthenticated" in failed(run, *remote(endpoint), "--host", "0.0.0.0")
    assert "nowhere" in failed(run, str(tmp_path / "nowhere"))
    assert "there is no backend" in failed(run, "opanai:x")
    assert "one key a line" in failed(run, *remote(endpoint), "--api-key-file", str(tmp_path / "none"))
    assert "device" in failed(run, "--device", "npu", "--canary").lower()


def test_settings_come_from_the_environment_and_the_config_file(run, endpoint, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[serve]\nserved-model-name = ["from-file"]\nmax-queue = 7\n')
    process = run(
        QVL_CONFIG=str(config), MODEL_ID="openai:echo", QVL_BASE_URL=endpoint.url, SERVER_HOST="127.0.0.1"
    ).wait_ready()
    found = httpx.get(process.address + "/v1/models", trust_env=False).json()
    assert [model["id"] for model in found["data"]] == ["from-file"]


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
