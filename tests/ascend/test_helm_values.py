"""The Helm chart's values: wrong ones are refused by name, odd ones arrive as they were written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvl import config
from tests.ascend.test_helm import HOSTS, containers, merged, needs_helm, of_kind, render, values

ON = {"enabled": True}
NPU = {"device": "npu", "devices": 1, "resource": "huawei.com/Ascend910"}


def rendered(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The objects by kind and component, such as `Job/download-0a1b2c3d`."""
    found = [one for path, text in render(given).items() if path.endswith(".yaml") for one in yaml.safe_load_all(text)]
    return {f"{one['kind']}/{one['metadata']['name'].removeprefix('shop-')}": one for one in found if one}


def download(**changes: object) -> tuple[str, list[str], list[str]]:
    """The job's name and arguments, and the arguments with which the engines wait for it."""
    objects = rendered(values("910b", {"weights": {"download": changes}}))
    ((name, job),) = [(name, one) for name, one in objects.items() if name.startswith("Job/")]
    return name, containers(job)[0]["args"], containers(objects["StatefulSet/engine"])[0]["args"]


@pytest.mark.parametrize("host", HOSTS)
def test_engines_wait_for_weights_that_a_job_downloads_where_they_read_them(host: str) -> None:
    (job,) = of_kind("Job", host).values()
    script, repository, folder, mark = containers(job)[0]["args"]
    wait, engine = containers(of_kind("StatefulSet", host)["shop-engine"])

    assert "hf download" in script
    assert repository.endswith(Path(folder).name)
    assert wait["args"][-2:] == [folder, mark]
    assert folder in engine["args"]


def test_another_download_is_another_job_and_another_mark() -> None:
    first, again = download(repo="a/b"), download(repo="a/b")
    others = [download(repo="a/c"), download(repo="a/b", hub="modelscope"), download(repo="a/b", image="own:1")]

    assert first == again
    assert len({name for name, *_ in [first, *others]}) == 4
    assert len({wait[-1] for *_, wait in [first, *others]}) == 4


def test_engines_start_neither_before_nor_on_the_weights_of_two_repositories(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.write_text('#!/bin/sh\n[ -z "$BROKEN" ] && echo "$2" > "$4/model.safetensors"\n')
    hf.chmod(0o755)

    def run(words: list[str], **environ: str) -> int:
        here = [word.replace("/models", str(tmp_path)) for word in words]
        environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(["sh", "-c", *here], env=environ, check=False, capture_output=True).returncode

    def starts(wait: list[str]) -> bool:
        return run([wait[0].replace("sleep 10", "exit 9"), *wait[1:]]) == 0

    _, job, wait = download(repo="a/b")
    _, newer, newer_wait = download(repo="a/b", image="own:1")
    _, other, other_wait = download(repo="a/c")

    assert run(job, BROKEN="1") != 0
    assert not starts(wait)
    assert run(job) == 0
    assert starts(wait)
    assert not starts(newer_wait)
    assert not starts(other_wait)
    # Another repository does not go into the same folder; the same one, by another image, does.
    assert run(other) != 0
    assert not starts(other_wait)
    assert starts(wait)
    assert run(newer, BROKEN="1") != 0
    assert not starts(wait)
    assert run(newer) == 0
    assert starts(newer_wait)
    assert next(tmp_path.glob("Qwen*/model.safetensors")).read_text() == "a/b\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"engine": {"replcias": 3}}, "replcias"),
        ({"engine": {"image": "qvl-npu"}}, "image"),
        ({"engine": {"device": "tpu"}}, "device"),
        ({"engine": {"dtype": "a: b"}}, "/engine/dtype"),
        ({"engine": {"env": {"QVL_MAX_PIXELS": 16777216}}}, "/engine/env/QVL_MAX_PIXELS.*want string"),
        ({"engine": {"env": {"TWO WORDS": "1"}}}, "TWO WORDS"),
        ({"engine": {"env": {"QVL_API_KEY": "secret"}}}, "QVL_API_KEY"),
        ({"engine": {"devices": 1}}, "engine.resource is needed"),
        ({"engine": {"device": "npu"}}, "engine.device is npu and engine.devices is 0"),
        ({"engine": {"device": "cuda", "resource": "nvidia.com/gpu"}}, "engine.device is cuda and engine.devices is 0"),
        ({"engine": NPU | {"device": "cpu"}}, "engine.devices is 1 and engine.device is cpu"),
        ({"engine": NPU | {"limits": {"huawei.com/Ascend910": 1}}}, "huawei.com/Ascend910 stands in engine.limits"),
        ({"engine": NPU | {"requests": {"huawei.com/Ascend910": 1}}}, "huawei.com/Ascend910 stands in engine.limits"),
        ({"engine": {"args": ["--api-key", "secret"]}}, "engine.args holds --api-key"),
        ({"pool": {"args": ["--api-key=secret"]}}, "pool.args holds --api-key"),
        ({"pool": None}, "missing property 'pool'"),
        ({"pool": {"service": None}}, "missing property 'service'"),
        ({"engine": {"limits": None}}, "missing property 'limits'"),
        ({"pool": {"service": {"port": 70000}}}, "/pool/service/port"),
        ({"redis": {"url": "redis://redis.data:6379/0"}}, "redis.enabled=false"),
        ({"redis": {"enabled": False, "url": "redis://:secret@redis.data:6379/0"}}, "redis.url holds a password"),
        ({"redis": {"enabled": False, "url": "redis://redis.data/0?password=secret"}}, "redis.url holds a password"),
        ({"autoscaling": {"kind": "cron"}}, "kind"),
        ({"autoscaling": ON}, "autoscaling.enabled needs monitoring.enabled"),
        ({"autoscaling": ON | {"minReplicas": 9, "maxReplicas": 2}, "monitoring": ON}, "minReplicas 9 is above"),
        ({"monitoring": ON | {"disabledAlerts": ["QvlEndpiontDown"]}}, "no alert QvlEndpiontDown; there are .*QvlEnd"),
        ({"monitoring": {"dashboard": ON}}, "dashboard.enabled needs monitoring.enabled"),
        ({"weights": {"enabled": True}}, "engine.model is needed"),
        ({"weights": {"enabled": True}, "engine": {"model": "Qwen/M"}}, "engine.model is Qwen/M"),
        ({"weights": {"enabled": True, "download": ON}, "engine": {"model": "m"}}, "download.repo"),
        ({"weights": {"download": {"hub": "modelscope", "endpoint": "http://a"}}}, "a mirror of Hugging Face"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(needs_helm.HelmError, match=said):
        render(wrong)


def test_large_numbers_arrive_as_they_were_written() -> None:
    many = 1_000_000
    objects = rendered(
        {
            "engine": {"drainSeconds": many, "startMinutes": many, "env": {"QVL_MAX_PIXELS": "16777216"}},
            "pool": {"drainSeconds": many},
            "autoscaling": ON | {"waiting": many},
            "monitoring": ON,
        }
    )
    for name in ("StatefulSet/engine", "Deployment/pool"):
        spec = objects[name]["spec"]["template"]["spec"]
        line = spec["containers"][0]["args"]
        assert line[line.index("--drain-timeout") + 1] == "1000000"
        assert spec["terminationGracePeriodSeconds"] == many + 20
    engine = containers(objects["StatefulSet/engine"])[-1]
    assert {"name": "QVL_MAX_PIXELS", "value": "16777216"} in engine["env"]
    assert engine["startupProbe"]["failureThreshold"] == 6 * many
    assert objects["ScaledObject/engine"]["spec"]["triggers"][0]["metadata"]["threshold"] == "1000000"


def test_strings_that_yaml_reads_as_something_else_stay_strings() -> None:
    objects = rendered(
        merged(
            values("910b", {}),
            {
                "engine": {"runtimeClassName": "1e3", "servedModelName": "a: b", "shm": "1e9"},
                "weights": {"storageClass": "no", "size": "1e12"},
            },
        )
    )
    spec = objects["StatefulSet/engine"]["spec"]["template"]["spec"]
    claim = objects["PersistentVolumeClaim/weights"]["spec"]

    assert spec["runtimeClassName"] == "1e3"
    assert "a: b" in spec["containers"][0]["args"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1e9"}} in spec["volumes"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("no", "1e12")


def test_a_namespace_of_ones_own_is_let_in_in_place_of_the_default() -> None:
    def let_in(**given: object) -> dict[str, str]:
        policy = rendered({"networkPolicy": given})["NetworkPolicy/inner"]
        selector: dict[str, str] = policy["spec"]["ingress"][0]["from"][1]["namespaceSelector"]["matchLabels"]
        return selector

    own = {"kubernetes.io/metadata.name": "mon"}
    assert let_in() == {"purpose": "monitoring"}
    assert let_in(monitoringNamespace=own) == own


def test_the_password_of_redis_comes_from_the_secret_and_stands_in_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://:$(REDIS_PASSWORD)@redis.data:6379/0"
    pool = containers(rendered({"redis": {"enabled": False, "url": url}})["Deployment/pool"])[-1]
    names = [entry["name"] for entry in pool["env"]]
    given = {entry["name"]: entry for entry in pool["env"]}

    assert given["REDIS_PASSWORD"]["valueFrom"] == {"secretKeyRef": {"name": "qvl", "key": "redis-password"}}
    # Kubernetes puts in the variables that stand before.
    assert names.index("REDIS_PASSWORD") < names.index("QVL_CACHE")
    assert "redis" not in " ".join(pool["args"])
    monkeypatch.setenv("QVL_CACHE", given["QVL_CACHE"]["value"].replace("$(REDIS_PASSWORD)", "secret"))
    assert config.load().cache == "redis://:secret@redis.data:6379/0"
