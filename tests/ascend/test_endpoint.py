"""The endpoint checks against real HTTP servers that decode pictures by each stack's rules.

The server's "model" answers with a word made of the pixels it sees, so other pixels give another answer.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageOps

from qvl.ascend.checks import endpoint
from qvl.parity.diagnose import tokens_of
from qvl.parity.stored import transparent_picture, turned_picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qvl.ascend.report import Finding


@dataclass
class Rules:
    """How a server behaves."""

    exif: bool = True
    alpha: bool = True
    vision: bool = True
    wordless: bool = False
    schema: str = "enforced"
    logprobs: str = "given"
    key: str = ""
    pixels: str = "honoured"
    models: tuple[str, ...] = ("qwen3-vl",)
    patch: int = 16
    most: int = 16777216
    told: dict[str, object] | None = None
    ends: bool = True
    moods: int = 1
    asked: int = 0


class Handler(BaseHTTPRequestHandler):
    rules: Rules

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output quiet."""

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.rules.key and self.headers.get("Authorization") != f"Bearer {self.rules.key}":
            self.reply(401, {"error": "Unauthorized"})
        else:
            told = {} if self.rules.told is None else {"processor": self.rules.told}
            self.reply(200, {"data": [{"id": name, **told} for name in self.rules.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("logprobs") and self.rules.logprobs == "refused":
            return self.reply(
                400, {"error": {"message": "logprobs are not supported", "code": "unsupported_parameter"}}
            )
        if "response_format" in body and self.rules.schema == "refused":
            return self.reply(400, {"object": "error", "message": "no response_format here"})
        if "mm_processor_kwargs" in body and self.rules.pixels == "refused":
            return self.reply(400, {"error": "mm_processor_kwargs are not trusted"})
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else []
        pixels = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        word = self.word(pixels[0]) if pixels and self.rules.vision else "hello"
        text = "SOMETHING" if self.rules.wordless else word
        self.rules.asked += 1
        text += ("" if self.rules.ends else "<|im_end|>\n<|im_start|>user") + "!" * (
            self.rules.asked % self.rules.moods
        )
        if "response_format" in body and self.rules.schema == "enforced":
            text = '{"canary": "QVL-7F3A"}'
        message: dict[str, Any] = {"role": "assistant", "content": text}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if body.get("logprobs") and self.rules.logprobs != "empty":
            sign = 1 if self.rules.logprobs == "odd" else -1
            choice["logprobs"] = {
                "content": [{"token": text, "logprob": sign * int(word[:4].encode().hex(), 16) / 2**32}]
            }
        limited = "mm_processor_kwargs" in body and self.rules.pixels == "honoured"
        seen = self.picture_tokens(pixels[0]) if pixels and self.rules.vision else 0
        most = int(body["mm_processor_kwargs"]["size"]["longest_edge"]) // 32**2 if limited else seen
        tokens = 10 + min(seen, most)
        usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
        if body.get("stream"):
            return self.events({**choice, "delta": choice.pop("message")}, usage)
        return self.reply(200, {"choices": [choice], "usage": usage})

    def events(self, choice: dict[str, Any], usage: dict[str, int]) -> None:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "qwen3-vl"}
        lines = [{**head, "choices": [choice]}, {**head, "choices": [], "usage": usage}]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for line in (*map(json.dumps, lines), "[DONE]"):
            self.wfile.write(f"data: {line}\n\n".encode())

    def picture_tokens(self, url: str) -> int:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return tokens_of(image.size, self.rules.patch, 4096, self.rules.most)

    def word(self, url: str) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        if self.rules.exif:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGBA" and self.rules.alpha:
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            image = white
        image = image.convert("RGB")
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:8]


@pytest.fixture
def serve() -> Iterator[Callable[[Rules], str]]:
    servers: list[ThreadingHTTPServer] = []

    def start(rules: Rules) -> str:
        handler = type("Bound", (Handler,), {"rules": rules})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def examine(url: str, **options: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in endpoint.check(url, **options)}


def first(url: str, check: str, **options: Any) -> Finding:
    """The finding of one check; what comes behind it is not asked."""
    return next(finding for finding in endpoint.check(url, **options) if finding.check == check)


def test_a_right_server_has_no_warning(serve: Callable[[Rules], str]) -> None:
    url = serve(Rules())

    found = examine(url)
    # This one tells no prompt.
    assert found.pop("endpoint-template").status == "skip"
    assert {finding.status for finding in found.values()} == {"ok"}, found
    for spelling in (f"{url}/", f"{url}/v1", f"{url}/v1/"):
        assert first(spelling, "endpoint-pixels").status == "ok"


@pytest.mark.parametrize("logprobs", ["given", "empty", "refused"])
@pytest.mark.parametrize(("rules", "wrong"), [({"exif": False}, "endpoint-exif"), ({"alpha": False}, "endpoint-alpha")])
def test_the_broken_decoding_rule_is_named_and_the_other_is_not(
    serve: Callable[[Rules], str], rules: dict[str, bool], wrong: str, logprobs: str
) -> None:
    found = examine(serve(Rules(**rules, logprobs=logprobs)))
    right = ({"endpoint-exif", "endpoint-alpha"} - {wrong}).pop()

    assert found[wrong].status == "warn"
    assert found[right].status == "ok"


def test_log_probabilities_tell_where_the_words_do_not(serve: Callable[[Rules], str]) -> None:
    found = examine(serve(Rules(exif=False, wordless=True)))

    assert (found["endpoint-exif"].status, found["endpoint-alpha"].status) == ("warn", "ok")


def test_a_model_that_always_says_the_same_without_logprobs_is_not_judged(serve: Callable[[Rules], str]) -> None:
    found = examine(serve(Rules(exif=False, wordless=True, logprobs="refused")))

    assert found["endpoint-exif"].status == "skip"


def test_answers_that_change_by_themselves_tell_nothing_of_pictures(serve: Callable[[Rules], str]) -> None:
    found = examine(serve(Rules(moods=5)))

    assert (found["endpoint-exif"].status, found["endpoint-alpha"].status) == ("skip", "skip")
    assert found["endpoint-repeats"].status == "warn"


def test_a_server_that_does_not_look_at_pictures_fails(serve: Callable[[Rules], str]) -> None:
    assert first(serve(Rules(vision=False)), "endpoint-picture").status == "fail"


@pytest.mark.parametrize(("schema", "status"), [("enforced", "ok"), ("refused", "warn"), ("ignored", "fail")])
def test_a_schema_that_is_ignored_in_silence_is_worse_than_a_refusal(
    serve: Callable[[Rules], str], schema: str, status: str
) -> None:
    assert first(serve(Rules(schema=schema)), "endpoint-schema").status == status


@pytest.mark.parametrize(
    ("logprobs", "status"), [("given", "ok"), ("refused", "warn"), ("empty", "warn"), ("odd", "fail")]
)
def test_logprobs_are_asked_for_and_looked_at(serve: Callable[[Rules], str], logprobs: str, status: str) -> None:
    assert first(serve(Rules(logprobs=logprobs)), "endpoint-logprobs").status == status


@pytest.mark.parametrize(("pixels", "status"), [("honoured", "ok"), ("refused", "ok"), ("ignored", "warn")])
def test_a_pixel_limit_that_is_ignored_in_silence_warns(
    serve: Callable[[Rules], str], pixels: str, status: str
) -> None:
    assert first(serve(Rules(pixels=pixels)), "endpoint-pixels").status == status


def test_a_key_is_sent_and_its_absence_told(serve: Callable[[Rules], str]) -> None:
    url = serve(Rules(key="k-123"))

    assert first(url, "endpoint", api_key="k-123").status == "ok"
    refused = first(url, "endpoint", api_key="k-999")
    assert refused.status == "fail"
    assert "k-999" not in refused.summary


def test_a_wrong_model_and_a_dead_address_fail(serve: Callable[[Rules], str]) -> None:
    assert "not other" in first(serve(Rules()), "endpoint", model="other").summary
    assert first("http://127.0.0.1:1", "endpoint").status == "fail"
    assert first("not a url", "endpoint").status == "fail"


def test_the_pictures_differ_as_they_should() -> None:
    turned = turned_picture()
    again = Image.open(io.BytesIO(base64.b64decode(endpoint.data_url(turned.stored).partition(",")[2])))

    assert ImageOps.exif_transpose(again).tobytes() == turned.right.tobytes()
    (lying,) = turned.wrong.values()
    assert again.tobytes() == lying.tobytes() != turned.right.tobytes()
    layered = transparent_picture()
    black, hidden = layered.wrong.values()
    assert layered.stored.convert("RGB").tobytes() == hidden.tobytes() != layered.right.tobytes()
    assert black.getpixel((0, 0)) == (0, 0, 0)
    assert layered.right.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("rules", "check", "told"),
    [
        (Rules(patch=14), "endpoint-tokens", "another patch size"),
        (Rules(most=65536), "endpoint-tokens", "another pixel budget"),
        (Rules(ends=False), "endpoint-end", "other stop tokens"),
        (Rules(moods=5), "endpoint-repeats", "depends on what else is in the batch"),
    ],
)
def test_what_parity_names_of_a_side_is_named_of_an_endpoint(
    serve: Callable[[Rules], str], rules: Rules, check: str, told: str
) -> None:
    found = first(serve(rules), check)
    assert found.status == "warn"
    assert told in found.summary
    assert found.fix


SMALL = {"min_pixels": 4096, "max_pixels": 65536}


@pytest.mark.parametrize(
    ("told", "status"),
    [
        (SMALL, "ok"),
        (None, "warn"),
        ({**SMALL, "max_pixels": 16777216}, "warn"),
        ({**SMALL, "min_pixels": 0}, "warn"),
        ({"max_pixels": "65536"}, "warn"),
    ],
)
def test_a_small_budget_that_is_told_is_no_fault_and_one_that_is_not_kept_is(
    serve: Callable[[Rules], str], told: dict[str, object] | None, status: str
) -> None:
    found = first(serve(Rules(most=65536, told=told)), "endpoint-tokens")
    assert found.status == status
    assert ("another pixel budget" in found.summary) == (status == "warn")


def test_patches_of_14_are_named_though_the_server_tells_them(serve: Callable[[Rules], str]) -> None:
    found = first(serve(Rules(most=65536, patch=14, told={**SMALL, "patch_size": 14})), "endpoint-tokens")
    assert "another patch size" in found.summary


def test_a_pixel_limit_is_told_apart_where_pictures_take_few_tokens(serve: Callable[[Rules], str]) -> None:
    for pixels, status in (("honoured", "ok"), ("ignored", "warn")):
        assert first(serve(Rules(most=12288, pixels=pixels)), "endpoint-pixels").status == status
