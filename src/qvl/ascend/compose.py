"""A compose file for N engines, one per NPU, behind one qvl-serve as their pool, with Redis, Prometheus and Grafana."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.resources import files as files_of
from typing import TYPE_CHECKING

import yaml

from qvl.ascend import recipe
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.ascend.recipe import ContainerPlan
    from qvl.types import JsonObject

_KEY = "${QVL_API_KEY:?set QVL_API_KEY in the environment or in a file .env}"


def files(plan: ContainerPlan, npus: tuple[int, ...], *, pool_image: str) -> dict[str, str]:
    """Return the files for `docker compose up` by path, Prometheus' alerts and Grafana's dashboard."""
    body = compose(plan, npus, pool_image=pool_image)
    engines = tuple(name for name in body["services"] if name.startswith("engine-"))
    return {
        "docker-compose.yml": to_yaml(body),
        "prometheus.yml": to_yaml(prometheus(engines)),
        "alerts.yml": _packaged("alerts.yml"),
        "grafana/datasources/prometheus.yml": to_yaml(_DATASOURCE),
        "grafana/dashboards/qvl.yml": to_yaml(_DASHBOARDS),
        "grafana/dashboards/qvl.json": _packaged("dashboard.json"),
    }


def compose(plan: ContainerPlan, npus: tuple[int, ...], *, pool_image: str) -> JsonObject:
    """Return the compose file as plain data, with an engine per NPU in `npus`, configured by `plan`.

    `pool_image` has qvl with its server and redis extras. The pool starts with the engines and uses each one once it
    is ready. Only the pool's port is published, on `plan.host`; all others stay on the internal network.
    """
    if plan.restart == "no":
        plan = replace(plan, restart="unless-stopped")
    # The pool keeps the answers; a second store behind it would hold each of them again.
    uncached = ("--cache", "off") if plan.engine == "qvl" else ()
    engine = replace(plan, answers="", with_key=True, extra=(*plan.extra, *uncached))
    engines = {f"engine-{number}": _engine(replace(engine, npus=(number,))) for number in npus}
    services = {
        **engines,
        "pool": _pool(plan, tuple(engines), pool_image),
        "redis": {
            "image": "redis:7.4-alpine",
            "restart": plan.restart,
            "command": ["redis-server", "--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru", "--save", ""],
            "healthcheck": _health(["CMD", "redis-cli", "ping"], start="5s"),
        },
        "prometheus": {
            "image": "prom/prometheus:v2.55.1",
            "restart": plan.restart,
            "volumes": [
                "./prometheus.yml:/etc/prometheus/prometheus.yml:ro",
                "./alerts.yml:/etc/prometheus/alerts.yml:ro",
                "prometheus:/prometheus",
            ],
            "secrets": ["qvl_key"],
        },
        "grafana": {
            "image": "grafana/grafana:11.3.1",
            "restart": plan.restart,
            "environment": {"GF_SECURITY_ADMIN_PASSWORD": "${GRAFANA_PASSWORD:?set GRAFANA_PASSWORD}"},
            "ports": ["127.0.0.1:3000:3000"],
            "volumes": ["./grafana:/etc/grafana/provisioning:ro", "grafana:/var/lib/grafana"],
            "depends_on": ["prometheus"],
        },
    }
    return {
        "name": "qvl",
        "services": services,
        "volumes": {"prometheus": {}, "grafana": {}},
        "secrets": {"qvl_key": {"environment": "QVL_API_KEY"}},
    }


def prometheus(engines: tuple[str, ...]) -> JsonObject:
    """Return the Prometheus configuration of the compose file: pool and engines, each scraped at /metrics."""
    jobs = {"qvl": ["pool:8000"], "engines": [f"{name}:{recipe.INNER_PORT}" for name in engines]}
    key = {"authorization": {"type": "Bearer", "credentials_file": "/run/secrets/qvl_key"}}
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": targets}], **key} for name, targets in jobs.items()
        ],
    }


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A YAML dumper without anchors: repeated values are written out, since people find anchors hard to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def to_yaml(value: object) -> str:
    """Return plain data (dicts, lists, strings, numbers, booleans) as YAML, in insertion order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text


def _packaged(name: str) -> str:
    return (files_of("qvl.ascend") / name).read_text(encoding="utf-8")


def _engine(plan: ContainerPlan) -> JsonObject:
    if plan.network or plan.docker_args:
        raise ConfigError("--network and --docker-arg are for docker run", hint="edit the compose file, or drop them")
    if plan.chip_facts.privileged:
        raise ConfigError(
            f"containers on {plan.chip_facts.kind} are privileged: with --compose every engine would see every NPU",
            hint="one container for all NPUs: -- --replicas N --devices npu, or --engine vllm",
        )
    if plan.privileged:
        raise ConfigError("--privileged with --compose would show every NPU to every engine", hint="drop --privileged")
    entrypoint, arguments = recipe.shell(plan)
    return {
        "image": plan.image,
        "restart": plan.restart,
        "devices": [f"{node}:{node}" for node in recipe.devices(plan)],
        "volumes": [
            *(f"{source}:{target}{':ro' if ro else ''}" for source, target, ro in recipe.volumes(plan)),
            *plan.mounts,
        ],
        "environment": {**recipe.environment(plan), **_further(plan.env), recipe.KEY_NAMES[plan.engine]: _KEY},
        "shm_size": plan.shm_size,
        "ulimits": {"nofile": {"soft": 65536, "hard": 65536}},
        "entrypoint": [entrypoint],
        # A single $ is compose's own substitution; the shell in the container must see it.
        "command": [word.replace("$", "$$") for word in arguments],
        "healthcheck": _health(["CMD", "python3", "-c", recipe.ready_script(plan.engine)], start="15m"),
    }


def _further(env: tuple[str, ...]) -> dict[str, str]:
    """Return --env as compose writes it: a name alone is the value of the shell that starts it."""
    pairs = (text.partition("=") for text in env)
    return {name: value if given else f"${{{name}:-}}" for name, given, value in pairs}


def _pool(plan: ContainerPlan, engines: tuple[str, ...], image: str) -> JsonObject:
    urls = [word for name in engines for word in ("--base-url", f"http://{name}:{recipe.INNER_PORT}/v1")]
    return {
        "image": image,
        "restart": plan.restart,
        "command": [
            *("qvl-serve", f"openai:{plan.label}", *urls),
            *("--host", "0.0.0.0", "--port", "8000", "--cache", "redis://redis:6379/0"),  # noqa: S104
            *("--served-model-name", plan.label),
        ],
        "environment": {"QVL_API_KEY": _KEY, "OPENAI_API_KEY": _KEY},
        "ports": [f"[{plan.host}]:{plan.port}:8000" if ":" in plan.host else f"{plan.host}:{plan.port}:8000"],
        "depends_on": {
            **{name: {"condition": "service_started"} for name in engines},
            "redis": {"condition": "service_healthy"},
        },
        "stop_grace_period": "2m",
    }


_DATASOURCE = {
    "apiVersion": 1,
    "datasources": [
        {
            "name": "Prometheus",
            "type": "prometheus",
            "url": "http://prometheus:9090",
            "isDefault": True,
            "uid": "prometheus",
        }
    ],
}
_DASHBOARDS = {
    "apiVersion": 1,
    "providers": [{"name": "qvl", "type": "file", "options": {"path": "/etc/grafana/provisioning/dashboards"}}],
}


def _health(test: list[str], *, start: str) -> JsonObject:
    return {"test": test, "interval": "15s", "timeout": "5s", "retries": 4, "start_period": start}
