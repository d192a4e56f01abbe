"""`qvl endpoints`: endpoints examined one by one, and the pool of a server that runs."""

from __future__ import annotations

import json

import pytest

from qvl.backends.openai import fleet
from tests.scripted_endpoint import Echo, ScriptedEndpoint
from tests.server.conftest import question, serve  # noqa: F401 - the fixture


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "QVL_API_KEY", "QVL_URL"):
        monkeypatch.delenv(name, raising=False)
    fleet.PROBED.clear()


def test_endpoints_are_examined(qvl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with ScriptedEndpoint() as one, ScriptedEndpoint(ignores=("response_format", "image_url")) as weak:
        ran = qvl("endpoints", "--base-url", one.url, "--base-url", weak.url, "--json")
        table = qvl("endpoints", "--base-url", one.url)
    assert ran.code == 0
    first, second = json.loads(ran.out)["endpoints"]
    assert (first["url"], first["reachable"], first["models"], first["model"]) == (one.url, True, ["echo"], "echo")
    assert first["capabilities"]["images"] > 0
    assert "json_schema" in first["capabilities"]["response_formats"]
    assert first["models_seconds"] > 0
    assert first["first_token_seconds"] > 0
    assert second["capabilities"]["images"] == 0
    assert "json_schema" not in second["capabilities"]["response_formats"]
    assert table.code == 0
    assert "pictures" in table.out
    assert "100000" in table.out
    assert f"endpoint {one.url}" in " ".join(table.out.split())


def test_an_endpoint_that_is_not_there_or_refuses_is_told_and_exits_1(qvl, monkeypatch, folder):
    with ScriptedEndpoint(api_key="sesame") as locked, ScriptedEndpoint(models=("a", "b")) as several:
        gone = ScriptedEndpoint().start()
        gone.stop()
        (folder / "list").write_text(f"{gone.url}\n{locked.url} weight=2\n")
        ran = qvl("endpoints", "--base-url", several.url, "--base-url-file", "list", "--json")
        two, away, key = json.loads(ran.out)["endpoints"]
        assert ran.code == 1
        assert (two["models"], two["reachable"]) == (["a", "b"], True)
        assert "name a model" in two["error"]
        assert (away["url"], away["reachable"]) == (gone.url, False)
        assert "cannot connect" in away["error"]
        assert "key" in key["error"]
        monkeypatch.setenv("QVL_API_KEY", "sesame")
        assert qvl("endpoints", "--base-url", locked.url).code == 0
        assert qvl("endpoints", "--base-url", several.url, "--model", "b", "--json").code == 0


def test_the_pool_of_a_server_is_shown_as_it_stands(qvl, serve, monkeypatch):  # noqa: F811
    from qvl.backends.openai.backend import OpenAIBackend

    with ScriptedEndpoint(default=Echo()) as one, ScriptedEndpoint() as gone:
        backend = OpenAIBackend("echo", base_url=[one.url, gone.url], weights=[2, 1], limit=5, probe=False)
        gone.stop()
        server = serve(backend, api_keys=("sesame",))
        for number in range(4):
            assert server.post(
                "/v1/chat/completions", question(f"q {number}"), Authorization="Bearer sesame"
            ).is_success
        refused = qvl("endpoints", "--url", server.url)
        assert (refused.code, "QVL_API_KEY" in refused.error) == (1, True)
        monkeypatch.setenv("QVL_API_KEY", "sesame")
        ran = qvl("endpoints", "--url", f"{server.url}/v1", "--json")
        monkeypatch.setenv("COLUMNS", "80")
        table = qvl("endpoints", "--url", server.url)
    up, resting = json.loads(ran.out)["endpoints"]
    assert (up["url"], up["state"], up["requests_total"], up["failures_total"]) == (one.url, "up", 4, 0)
    assert (up["weight"], up["limit"], up["requests_running"], up["picture_tokens"]) == (2.0, 5.0, 0, 0)
    assert up["first_token_seconds"] > 0
    assert (resting["url"], resting["state"]) == (gone.url, "resting")
    assert resting["failures_total"] >= 1
    assert (ran.code, table.code) == (1, 1)
    assert f"{gone.url} " in table.out, "80 columns are enough for a URL"
    assert "resting" in table.out
    assert "weight=2 limit=5" in table.out


def test_what_is_no_pool_is_one_line(qvl, serve):  # noqa: F811
    ran = qvl("endpoints", "--url", serve().url)
    assert (ran.code, "no pool of endpoints" in ran.error) == (2, True)
    ran = qvl("endpoints", "--url", "http://127.0.0.1:9")
    assert (ran.code, "does not answer" in ran.error) == (1, True)
    with ScriptedEndpoint() as other:
        assert "is --url a qvl-serve?" in qvl("endpoints", "--url", other.url).error
        qvl("endpoints", "--url", f"{other.url}?tenant=a")
        assert other.requests[-1].path == "/metrics?tenant=a"
    for wrong in ([], ["--url", "http://a", "--base-url", "http://b"], ["--url", "a:b"], ["--base-url", "nonsense"]):
        ran = qvl("endpoints", *wrong)
        assert ran.code == 2
        assert ran.error
    assert qvl("endpoints", "--base-url", "http://a", "--watch", "1").code == 2


def test_labels_are_read_as_they_were_written():
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector

    from qvl.cli.endpoints import read_metrics

    class Odd(Collector):
        def collect(self):
            family = GaugeMetricFamily("qvl_endpoint_weight", "x", labels=["endpoint"])
            family.add_metric(['http://a/"v}1\\{,x="y'], 2.0)
            yield family

    registry = CollectorRegistry()
    registry.register(Odd())
    (endpoint,) = read_metrics(generate_latest(registry).decode(), "http://server")
    assert (endpoint.url, endpoint.numbers["weight"]) == ('http://a/"v}1\\{,x="y', 2.0)
