"""The Helm chart, linted and rendered by Helm's own library, and what it renders held against Kubernetes and qvl."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl.ascend import recipe
from qvl.ascend.recipe import ContainerPlan
from qvl.backends.openai.endpoint_list import read_endpoint_list
from qvl.cli import load_command

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "deploy" / "helm"
ALERTS = CHART.parents[1] / "src/qvl/ascend/alerts.yml"
HOSTS = ("910b", "a3", "gpu", "cpu")
EVERYTHING: dict[str, Any] = {
    "autoscaling": {"enabled": True},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "dashboard": {"enabled": True}},
    "imagePullSecrets": [{"name": "registry"}],
    "pool": {"endpoints": ["http://elsewhere:8000/v1 weight=2 limit=16"]},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "hpa": {"autoscaling": {"enabled": True, "kind": "hpa"}, "monitoring": {"enabled": True}},
    "hub": {"weights": {"enabled": False}, "engine": {"model": "Qwen/Qwen3-VL-8B-Instruct"}},
    "bare": {"redis": {"enabled": False}, "networkPolicy": {"enabled": False}},
    "own-redis": {"redis": {"enabled": False, "url": "redis://:$(REDIS_PASSWORD)@redis.data:6379/0"}},
}
# Kinds that an operator brings; Kubernetes' own schemas do not have them.
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
needs_helm = pytest.importorskip("helm_python", reason="helm is not here; `make test-deploy` installs it")
cases = pytest.mark.parametrize(("host", "options"), [(host, name) for host in ("", *HOSTS) for name in OPTIONS])


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What Helm makes of two values files."""
    deep = {key: merged(base[key], value) for key, value in over.items() if isinstance(base.get(key), dict)}
    return {**base, **over, **deep}


def values(host: str, options: dict[str, Any]) -> dict[str, Any]:
    own = yaml.safe_load((CHART / f"values-{host}.yaml").read_text(encoding="utf-8")) if host else {}
    return merged(own, options)


def render(given: dict[str, Any]) -> dict[str, str]:
    with needs_helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(given)
        texts: dict[str, str] = chart.render(given, name="shop", namespace="vision")
    return texts


@cache
def rendered(host: str, options: str = "plain") -> tuple[dict[str, Any], ...]:
    texts = render(values(host, OPTIONS[options]))
    found = [one for path, text in texts.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]
    return tuple(found)


def of_kind(kind: str, host: str, options: str = "plain") -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in rendered(host, options) if one["kind"] == kind}


def workloads(host: str, options: str = "plain") -> list[dict[str, Any]]:
    return [one for one in rendered(host, options) if one["kind"] in ("Deployment", "StatefulSet", "Job")]


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    spec = workload["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def words(workload: dict[str, Any]) -> list[str]:
    container = containers(workload)[-1]
    return [*container.get("command", []), *container.get("args", [])]


@cases
def test_lint_finds_nothing(host: str, options: str) -> None:
    report = needs_helm.lint(str(CHART), values(host, OPTIONS[options]), strict=True)

    assert not report["errors"]
    # 1 is a remark: a chart without an icon.
    assert [one for one in report["messages"] if one["severity"] > 1] == []


@cases
def test_kubernetes_takes_every_object(host: str, options: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="`make test-deploy` installs kubernetes-validate")
    for version in ("1.30", "1.37"):
        for one in rendered(host, options):
            if one["kind"] not in CUSTOM:
                validate.validate(one, version, strict=True)


@cases
def test_names_are_unique_and_all_in_one_namespace(host: str, options: str) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in rendered(host, options)]

    assert len(set(names)) == len(names)
    assert {one["metadata"]["namespace"] for one in rendered(host, options)} == {"vision"}


@cases
def test_selectors_find_their_own_pods_and_no_others(host: str, options: str) -> None:
    pods = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in workloads(host, options)}
    for one in rendered(host, options):
        if one["kind"] not in ("Service", "Deployment", "StatefulSet", "PodDisruptionBudget"):
            continue
        selector = one["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert [name for name, labels in pods.items() if wanted.items() <= labels.items()] == [one["metadata"]["name"]]


@cases
def test_pods_are_restricted_and_root_only_where_the_device_asks_for_it(host: str, options: str) -> None:
    for workload in workloads(host, options):
        spec = workload["spec"]["template"]["spec"]
        root = host in ("910b", "a3") and workload["kind"] == "StatefulSet"
        assert spec["securityContext"].get("runAsNonRoot") is (None if root else True)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        # A Service's name in the environment, QVL_PORT for one named qvl, would be a setting of qvl-serve.
        assert not spec["enableServiceLinks"]
        assert not any("hostPath" in volume for volume in spec.get("volumes", []))
        assert "privileged" not in json.dumps(spec)
        for container in containers(workload):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            if not root:
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert security["readOnlyRootFilesystem"] is True


@cases
def test_volumes_and_mounts_fit(host: str, options: str) -> None:
    for workload in workloads(host, options):
        declared = {volume["name"] for volume in workload["spec"]["template"]["spec"].get("volumes", [])}
        mounted = {mount["name"] for one in containers(workload) for mount in one.get("volumeMounts", [])}
        assert mounted == declared


@cases
def test_the_pool_reads_a_list_of_every_engine(host: str, options: str, tmp_path: Path) -> None:
    text = of_kind("ConfigMap", host, options)["shop-endpoints"]["data"]["endpoints"]
    (tmp_path / "endpoints").write_text(text)
    listed = [one.url for one in read_endpoint_list(tmp_path / "endpoints")]
    engine = of_kind("StatefulSet", host, options)["shop-engine"]
    count = engine["spec"].get("replicas", 8)

    assert engine["spec"]["serviceName"] in of_kind("Service", host, options)
    own = [f"http://shop-engine-{index}.shop-engine:8000/v1" for index in range(count)]
    assert listed[: len(own)] == own
    assert len(listed) == len(own) + (options == "everything")


@cases
def test_commands_of_qvl_serve_are_what_its_parser_takes(host: str, options: str) -> None:
    served = 0
    for workload in workloads(host, options):
        line = words(workload)
        if "qvl-serve" in line:
            load_command("serve").make_context("serve", line[line.index("qvl-serve") + 1 :])
            served += 1
    assert served == (1 if host == "a3" else 2)


@cases
def test_draining_ends_before_kubernetes_kills(host: str, options: str) -> None:
    for workload in workloads(host, options):
        line = words(workload)
        if "--drain-timeout" in line:
            drain = int(line[line.index("--drain-timeout") + 1])
            assert drain < workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


@cases
def test_keys_come_from_the_secret_and_every_image_has_a_tag(host: str, options: str) -> None:
    for workload in workloads(host, options):
        for container in containers(workload):
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")
            for entry in container.get("env", []):
                if entry["name"].endswith(("KEY", "TOKEN", "PASSWORD")):
                    assert entry["valueFrom"]["secretKeyRef"]["name"] == "qvl"
    assert not of_kind("Secret", host, options)


@pytest.mark.parametrize("host", HOSTS)
def test_probes_ask_the_paths_that_the_engine_has(host: str) -> None:
    kind = "vllm" if host == "a3" else "qvl"
    container = containers(of_kind("StatefulSet", host)["shop-engine"])[-1]

    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    for probe in ("startupProbe", "readinessProbe"):
        script = container[probe]["exec"]["command"][-1]
        compile(script, probe, "exec")
        assert f"8000{recipe.READY_PATHS[kind]}" in script
        assert recipe.KEY_NAMES[kind] in script
        assert recipe.KEY_NAMES[kind] in {entry["name"] for entry in container["env"]}


def flags(line: list[str]) -> dict[str, str]:
    """Each flag with the word after it, empty where that is a flag too."""
    pairs = zip(line, [*line[1:], "--"], strict=True)
    return {word: "" if after.startswith("--") else after for word, after in pairs if word.startswith("--")}


@pytest.mark.parametrize(("host", "resource", "count"), [("910b", "Ascend910", 1), ("a3", "Ascend910", 2)])
def test_an_engine_on_npus_has_what_launch_gives_it(host: str, resource: str, count: int) -> None:
    engine = "vllm" if host == "a3" else "qvl"
    model = containers(of_kind("StatefulSet", host)["shop-engine"])[-1]
    plan = ContainerPlan(
        model=f"Qwen/{values(host, {})['engine']['model']}", image="a:1", npus=tuple(range(count)), engine=engine,
        chip="910B3" if host == "910b" else "Ascend910", with_key=True,
    )  # fmt: skip
    given = {entry["name"]: entry.get("value") for entry in model["env"]}
    line = words(of_kind("StatefulSet", host)["shop-engine"])

    assert model["resources"]["limits"][f"huawei.com/{resource}"] == count
    # The device plugin numbers what it hands out.
    assert {
        k: v for k, v in recipe.environment(plan).items() if k != "ASCEND_RT_VISIBLE_DEVICES"
    }.items() <= given.items()
    # A pod is reached on its own address, and reads the weights where the volume is mounted.
    away = {"--host": "0.0.0.0", "--port": "8000"}
    assert (flags(recipe.command(plan)) | away).items() <= flags(line[4:]).items()
    assert line[2] == recipe.shell(plan)[1][1]


def test_scaling_follows_the_queue_of_the_pool() -> None:
    (keda,) = of_kind("ScaledObject", "910b", "everything").values()
    (hpa,) = of_kind("HorizontalPodAutoscaler", "910b", "hpa").values()
    trigger = keda["spec"]["triggers"][0]["metadata"]

    assert "qvl_num_requests_waiting" in trigger["query"]
    assert 'namespace="vision",service="shop-pool"' in trigger["query"]
    assert hpa["spec"]["metrics"][0]["external"]["metric"]["name"] == "qvl_num_requests_waiting"
    # KEDA's cooldownPeriod is for the last replica alone, which minReplicas keeps; the rest is this HPA's.
    slow = {"stabilizationWindowSeconds": 900, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}]}
    assert keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == {"scaleDown": slow}
    assert hpa["spec"]["behavior"] == {"scaleDown": slow}
    assert "cooldownPeriod" not in keda["spec"]
    for one in (keda, hpa):
        assert one["spec"]["scaleTargetRef"]["name"] == "shop-engine"
    # What scales sets the number; two that do would undo each other at every upgrade.
    assert "replicas" not in of_kind("StatefulSet", "910b", "everything")["shop-engine"]["spec"]


def test_prometheus_gets_the_key_and_the_alerts() -> None:
    monitors = of_kind("ServiceMonitor", "910b", "everything")
    (rules,) = of_kind("PrometheusRule", "910b", "everything").values()
    shipped = {one["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for one in group["rules"]}

    assert set(monitors) == {"shop-pool", "shop-engine"}
    for monitor in monitors.values():
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["authorization"]["credentials"] == {"name": "qvl", "key": "api-key"}
    # Engines that autoscaling took away are no reason for an alert.
    assert {one["alert"] for group in rules["spec"]["groups"] for one in group["rules"]} == shipped - {
        "QvlEndpointDown"
    }


def test_every_expression_is_promql() -> None:
    parser = pytest.importorskip("promql_parser", reason="`make test-deploy` installs promql-parser")
    (keda,) = of_kind("ScaledObject", "910b", "everything").values()
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            parser.parse(rule["expr"])
    parser.parse(keda["spec"]["triggers"][0]["metadata"]["query"])


def test_alerts_fire_and_stay_silent_as_meant(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not here; it comes with Debian's package prometheus")
    shutil.copy(ALERTS, tmp_path / "alerts.yml")
    shutil.copy(HERE / "recordings" / "alerts_test.yml", tmp_path / "alerts_test.yml")
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "alerts_test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
