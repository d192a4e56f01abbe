"""Lines, files and batches for the tests of batches."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import openai

CHAT = "/v1/chat/completions"


def line(custom_id: str, text: str = "hello world", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": "echo-vl", "messages": [{"role": "user", "content": text}]} | fields
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, io.BytesIO(content)), purpose="batch").id


def begin(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **options: Any) -> Any:
    options = {"completion_window": "24h"} | options
    return client.batches.create(input_file_id=upload(client, content), endpoint=endpoint, **options)


def ended(client: openai.OpenAI, batch: Any, seconds: float = 60) -> Any:
    """The batch, once it has its last state."""
    end = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def content(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of an output file by custom_id; each is there once."""
    assert file_id is not None
    lines = [json.loads(one) for one in client.files.content(file_id).text.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found
