"""Qwen's published chat templates: data of others, in a folder that QVL_PUBLISHED_QWEN3_VL names where there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def published_template(kind: str) -> str:
    """The chat template of `kind`, "instruct" or "thinking"; skips where there is none."""
    folder = os.environ.get("QVL_PUBLISHED_QWEN3_VL")
    if not folder:
        pytest.skip("QVL_PUBLISHED_QWEN3_VL names no folder with the published templates")
    file = Path(folder, kind, "chat_template.json")
    template: str = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return template
