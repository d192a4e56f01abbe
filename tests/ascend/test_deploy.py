"""The compose file that `qvl launch` writes and the one that ships, as parsed YAML."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl.ascend import chips, compose
from qvl.ascend.recipe import ContainerPlan
from qvl.errors import ConfigError

DEPLOY = Path(__file__).parents[2] / "deploy"


def plan(**changes: Any) -> ContainerPlan:
    base = {"model": "Qwen/Qwen3-VL-8B-Instruct", "image": "qvl-npu:0.1.0", "npus": (0,)}
    return ContainerPlan(**{**base, **changes})


class TestCompose:
    @pytest.mark.parametrize("engine", ["qvl", "vllm"])
    def test_what_is_written_reads_back_as_what_was_meant(self, engine: str) -> None:
        body = compose.compose(plan(engine=engine), (0, 3), pool_image="qvl-npu:0.1.0")

        assert yaml.safe_load(compose.to_yaml(body)) == json.loads(json.dumps(body))

    @pytest.mark.parametrize(
        "value", ["yes", "1", "a: b", "- x", "", "#", "über 日本", 'q"\\', "no", "0x1", "null", "a b", "@x", "1e3", "~"]
    )
    def test_every_string_stays_a_string(self, value: str) -> None:
        assert yaml.safe_load(compose.to_yaml({"key": value, "list": [value, [value], {}, []]})) == {
            "key": value,
            "list": [value, [value], {}, []],
        }

    def test_every_engine_has_one_npu_of_its_own(self) -> None:
        body = compose.compose(plan(), (1, 4), pool_image="qvl-npu:0.1.0")
        engines = {name: service for name, service in body["services"].items() if name.startswith("engine-")}

        assert list(engines) == ["engine-1", "engine-4"]
        for number in (1, 4):
            service = engines[f"engine-{number}"]
            nodes = [entry.partition(":")[0] for entry in service["devices"]]
            assert nodes == [f"/dev/davinci{number}", *(f"/dev/{node}" for node in chips.DEFAULT.control_nodes)]
            assert service["environment"]["ASCEND_RT_VISIBLE_DEVICES"] == "0"
            assert "ports" not in service
            assert "privileged" not in service

    def test_the_pool_knows_every_engine_and_is_published_alone(self) -> None:
        body = compose.compose(plan(port=9000), (1, 4), pool_image="pool:1")
        pool = body["services"]["pool"]
        urls = [word for word in pool["command"] if word.startswith("http")]

        assert urls == ["http://engine-1:8000/v1", "http://engine-4:8000/v1"]
        assert pool["command"][:2] == ["qvl-serve", "openai:Qwen3-VL-8B-Instruct"]
        assert pool["ports"] == ["127.0.0.1:9000:8000"]
        published = {name for name, service in body["services"].items() if "ports" in service}
        assert published == {"pool", "grafana"}

    def test_no_secret_is_written_and_every_one_is_asked_for(self) -> None:
        text = compose.to_yaml(compose.compose(plan(), (0,), pool_image="pool:1"))

        assert "${QVL_API_KEY:?" in text
        assert "${GRAFANA_PASSWORD:?" in text

    def test_a_dollar_reaches_the_shell_in_the_container(self) -> None:
        command = compose.compose(plan(), (0,), pool_image="pool:1")["services"]["engine-0"]["command"]

        assert '. "$$f"' in command[1]
        assert not [word for word in command if "$" in word.replace("$$", "")]

    def test_redis_evicts(self) -> None:
        command = compose.compose(plan(), (0,), pool_image="pool:1")["services"]["redis"]["command"]

        assert command[command.index("--maxmemory-policy") + 1] == "allkeys-lru"

    def test_privileged_engines_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="every NPU"):
            compose.compose(plan(privileged=True), (0,), pool_image="pool:1")

    def test_prometheus_scrapes_the_pool_and_every_engine(self) -> None:
        written = compose.files(plan(), (0, 1), pool_image="pool:1")
        jobs = yaml.safe_load(written["prometheus.yml"])["scrape_configs"]
        targets = [target for job in jobs for target in job["static_configs"][0]["targets"]]
        mounts = compose.compose(plan(), (0, 1), pool_image="pool:1")["services"]["prometheus"]["volumes"]

        assert targets == ["pool:8000", "engine-0:8000", "engine-1:8000"]
        assert all(job["authorization"]["credentials_file"] for job in jobs)
        assert "./alerts.yml:/etc/prometheus/alerts.yml:ro" in mounts
        assert yaml.safe_load(written["prometheus.yml"])["rule_files"] == ["alerts.yml"]

    def test_dashboard_and_alerts_are_written_too(self) -> None:
        written = compose.files(plan(), (0, 1), pool_image="pool:1")

        assert json.loads(written["grafana/dashboards/qvl.json"])["panels"]
        assert yaml.safe_load(written["alerts.yml"])["groups"]

    def test_the_shipped_example_is_what_launch_writes_for_eight_npus(self) -> None:
        for path, text in compose.files(plan(), tuple(range(8)), pool_image="qvl-npu:0.1.0").items():
            assert (DEPLOY / "compose" / path).read_text(encoding="utf-8") == text, path

    def test_docker_compose_accepts_it(self, tmp_path: Path) -> None:
        docker = shutil.which("docker")
        found = (
            docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
        )
        if not found:
            pytest.skip("the compose plugin of docker is not here")
        for path, text in compose.files(plan(), (0, 1), pool_image="pool:1").items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        done = subprocess.run(
            [str(docker), "compose", "-f", str(tmp_path / "docker-compose.yml"), "config", "--quiet"],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "QVL_API_KEY": "k", "GRAFANA_PASSWORD": "p"},
        )
        assert done.returncode == 0, done.stderr


def test_prometheus_for_one_server_parses() -> None:
    body = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())

    assert body["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


def test_no_image_is_used_without_a_tag() -> None:
    body = compose.compose(plan(), (0,), pool_image="qvl-npu:0.1.0")
    images = [service["image"] for service in body["services"].values()]

    assert all(":" in image and not image.endswith(":latest") for image in images)
