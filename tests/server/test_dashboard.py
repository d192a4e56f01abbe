"""The Grafana dashboard asks for series that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.server.conftest import Running, question

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "qvl.json"


def test_every_series_of_the_dashboard_exists(server: Running) -> None:
    server.post("/v1/chat/completions", question())
    told = server.get("/metrics").text
    known = set(re.findall(r"^# TYPE (\S+)", told, re.M))
    known |= {name for base in list(known) for name in (f"{base}_bucket", f"{base}_total")}
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    asked = {name for expression in expressions for name in re.findall(r"qvl_[a-z0-9_]+", expression)}
    assert asked
    assert asked <= known, asked - known
