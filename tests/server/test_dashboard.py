"""The Grafana dashboard and the alerts ask for series that a server has."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
import yaml

from qvl.backends.openai.backend import OpenAIBackend
from tests.server.conftest import Running, question

if TYPE_CHECKING:
    from collections.abc import Iterable

DASHBOARD = json.loads((files("qvl.ascend") / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((files("qvl.ascend") / "alerts.yml").read_text(encoding="utf-8"))
# Those of Ray's backend, which tests/backends/ray asks where Ray is installed.
OF_RAY = {"qvl_backend_replicas", "qvl_backend_replicas_running", "qvl_backend_moved_total"}


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]


def series(expressions: Iterable[str]) -> set[str]:
    return {name for expression in expressions for name in re.findall(r"qvl_[a-z0-9_]+", expression)}


def of_pool() -> set[str]:
    backend = OpenAIBackend("m", base_url=["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"], api_key="k")
    return {f"qvl_backend_{name}" for name in backend.stats()}


@pytest.mark.parametrize("expressions", [dashboard_expressions(), alert_expressions()], ids=["dashboard", "alerts"])
def test_every_series_exists(server: Running, expressions: list[str]) -> None:
    server.post("/v1/chat/completions", question())
    told = server.get("/metrics").text
    known = set(re.findall(r"^# TYPE (\S+)", told, re.M)) | of_pool() | OF_RAY
    known |= {name for base in list(known) for name in (f"{base}_bucket", f"{base}_total")}

    assert series(expressions)
    assert series(expressions) <= known, series(expressions) - known


def test_endpoints_fail_overs_and_replicas_are_shown() -> None:
    wanted = {"qvl_backend_endpoints_up", "qvl_backend_failovers_total", "qvl_backend_replicas_running"}

    assert wanted <= series(dashboard_expressions())
    assert wanted <= series(alert_expressions())


def test_batches_are_shown() -> None:
    wanted = {
        "qvl_batches",
        "qvl_batches_ended_total",
        "qvl_batch_requests_total",
        "qvl_batch_requests_running",
        "qvl_batch_disk_bytes",
    }

    assert wanted <= series(dashboard_expressions())


def test_panels_do_not_cover_each_other() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        covered = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not covered & cells, panel["title"]
        cells |= covered
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
