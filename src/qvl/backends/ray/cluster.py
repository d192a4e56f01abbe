"""Joins this process to a Ray cluster: a new local one, the one the program has joined, or one at an address."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Final

from qvl.errors import BackendUnavailableError, ConfigError, MissingDependencyError, first_line
from qvl.log import logger
from qvl.suggest import install_line

DEVICES: Final = ("auto", "npu", "cuda", "cpu")
# Ray's names for what a device is counted by. It knows NPUs by /dev/davinciN and sets ASCEND_RT_VISIBLE_DEVICES.
RESOURCES: Final = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}
OBJECT_STORE_BYTES: Final = 512 << 20
MOST_CPUS: Final = 8
CONNECT_SECONDS: Final = 5.0
STARTS: Final = 3
FREE_SECONDS: Final = 15.0
log = logger("qvl.backends.ray")


@dataclass(slots=True)
class _Connection:
    """The connection of the process to Ray, with its number of users. `ours`: this module made it, and ends it."""

    users: int = 0
    ours: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_connection: Final = _Connection()


@dataclass(frozen=True, slots=True)
class Share:
    """The resources of one engine: a device of `kind`, and CPU cores."""

    kind: str
    cpus: float

    def actor_options(self) -> dict[str, object]:
        """Return these resources as Ray's `ray_actor_options`."""
        if self.kind == "npu":
            return {"num_cpus": self.cpus, "resources": {"NPU": 1}}
        return {"num_cpus": self.cpus} if self.kind == "cpu" else {"num_cpus": self.cpus, "num_gpus": 1}


def require_ray(module: str = "ray") -> ModuleType:
    """Return `module` of Ray, imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    import importlib

    # Set before the import, which reads them: nothing is reported to anybody, and no accelerator is hidden from a
    # process that asked for none.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends a process that has not reached the head for so long, requests and all; a minute by default, in which no
    # head comes back on another host.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(f"replicas need the package {exc.name!r}", hint=install_line("ray")) from exc


def check_settings(replicas: int, devices: str, address: str | None) -> None:
    """Check the settings before anything is started.

    Raises:
        ConfigError: a setting is invalid.
    """
    if replicas < 1:
        raise ConfigError(f"replicas={replicas} is out of range", hint="1 or more", param="replicas")
    if devices not in DEVICES:
        raise ConfigError(f"unknown devices={devices!r}", hint=f"one of {', '.join(DEVICES)}", param="devices")
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            "a Ray client (ray://) cannot stream answers",
            hint="run `ray start --address=HEAD:6379` on this host and give 'auto'",
            param="ray_address",
        )
    if address is not None and address != "auto":
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit():
            raise ConfigError(f"invalid ray_address={address!r}", hint="auto, or HOST:6379", param="ray_address")


def join(address: str | None, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """Connect this process to Ray, or add a user to its connection. Each call needs a call of `leave`.

    Args:
        address: address of a running cluster; None starts one on this machine that ends with this process.
        object_store_bytes: shared memory of a cluster started by this call.

    Raises:
        MissingDependencyError: Ray is not installed.
        BackendUnavailableError: no cluster answers at the address.
    """
    ray = require_ray()
    with _connection.lock:
        if not ray.is_initialized():
            _init(ray, address, object_store_bytes)
            _connection.ours, _connection.users = True, 0
        _connection.users += 1


def take_back_sigterm() -> None:
    """Restore the SIGTERM handler from before Ray's. Has an effect in the main thread only.

    Ray's core handles SIGTERM as a crash: it prints a stack and ends the process 3 s later.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGTERM, handler)


def leave() -> None:
    """Remove a user of the connection; the last one closes a connection that `join` made."""
    ray = require_ray()
    with _connection.lock:
        _connection.users -= 1
        if _connection.users == 0 and _connection.ours:
            _connection.ours = False
            ray.shutdown()


def _init(ray: ModuleType, address: str | None, object_store_bytes: int) -> None:
    if address not in (None, "auto"):
        _knock(str(address))
    own = {"include_dashboard": False, "object_store_memory": object_store_bytes} if address is None else {}
    # It would say that clusters want a token, which is as it should be, and that SIGTERM is left to us.
    for name in ("ray._private.authentication", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for attempt in range(STARTS):
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **own)
            return
        except Exception as exc:
            if address is not None:
                raise BackendUnavailableError(
                    f"cannot join the Ray cluster at {address!r}: {first_line(exc)}",
                    hint="on this host: ray start --address=HEAD:6379 (on the head: ray start --head)",
                ) from exc
            if attempt == STARTS - 1:
                raise BackendUnavailableError(
                    f"cannot start Ray: {first_line(exc)}",
                    hint="raylet.err, in the logs of Ray's newest session, says why",
                ) from exc
            # Its node gives up when its own helpers take more than 15 s to start (ray-project/ray#65983).
            log.warning("ray_start", error=first_line(exc), attempt=attempt + 1)
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise BackendUnavailableError if `address` refuses connections; Ray would end the process after a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as exc:
        raise BackendUnavailableError(
            f"no Ray cluster answers at {address!r}: {exc.strerror or exc}", hint="on the head: ray start --head"
        ) from exc


def head_problem() -> str | None:
    """Return why the cluster's head cannot be reached, or None; it may take CONNECT_SECONDS."""
    address = require_ray().get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as exc:
        return f"the Ray cluster's head at {address} does not answer: {exc.strerror or exc}"
    return None


class Membership:
    """This process's place in the cluster that it has joined. Made after `join`.

    A head that starts without the tables of the one before it is the head of another cluster, at the same address: it
    knows none of its processes, and Ray has no way to join it from a process that was in the first one.
    """

    def __init__(self) -> None:
        self._address: str = require_ray().get_runtime_context().gcs_address
        self._cluster = self._identifier()
        # The one of this host that the process speaks to.
        self._node: str = require_ray("ray._private.worker").global_worker.node.raylet_socket_name

    def lost(self) -> str | None:
        """Return why this process is in no cluster any more, or None; call it while the head answers."""
        try:
            with socket.socket(socket.AF_UNIX) as knock:
                knock.settimeout(CONNECT_SECONDS)
                knock.connect(self._node)
        except OSError:
            return "the Ray node of this host, which this process was connected to, has ended"
        found = self._identifier()
        if self._cluster and found and found != self._cluster:
            return f"the Ray cluster at {self._address} is another one than before: its head has lost its tables"
        return None

    def _identifier(self) -> str:
        """Return the cluster's id as its head tells it now; "" if it does not."""
        try:
            client = require_ray("ray._raylet").GcsClient(address=self._address)
            return str(client.cluster_id.hex())
        except Exception as exc:  # noqa: BLE001 - Ray raises what it likes, and a head may go at any moment
            log.debug("ray_cluster_id", error=first_line(exc))
            return ""


def room(replicas: int, devices: str, cpus: float | None = None) -> Share:
    """Return the resources for each of `replicas` engines; `cpus`: cores of each, None for an even share. After `join`.

    Raises:
        ConfigError: the cluster does not have enough free devices or cores.
    """
    ray = require_ray()
    total: Mapping[str, float] = ray.cluster_resources()
    kind = devices
    if kind == "auto":
        kind = next((name for name in ("npu", "cuda") if total.get(RESOURCES[name], 0) >= 1), "cpu")
    cores = total.get("CPU", 0)
    if cpus is None:
        share = cores / replicas
        cpus = float(max(1, min(MOST_CPUS, int(share)))) if kind != "cpu" else float(int(share)) or round(share, 2)
    need = {"CPU": cpus * replicas, **({} if kind == "cpu" else {RESOURCES[kind]: float(replicas)})}
    end = time.monotonic() + FREE_SECONDS
    while True:
        free: Mapping[str, float] = ray.available_resources()
        short = next((name for name in reversed(need) if free.get(name, 0) < need[name]), None)
        if short is None:
            return Share(kind, cpus)
        if total.get(short, 0) < need[short] or time.monotonic() > end:
            break
        # What another program has just given back is counted a moment later.
        time.sleep(0.2)
    way = "more hosts, or --devices cpu" if short != "CPU" else "or --option cpus_per_replica=0.5"
    raise ConfigError(
        f"{replicas} replicas need {need[short]:g} {short}, but {free.get(short, 0):g} of the Ray cluster's "
        f"{total.get(short, 0):g} are free",
        hint=f"see `ray status`; fewer --replicas, {way}",
        param="replicas",
    )


def count(devices: str) -> int:
    """Return the number of NPUs or GPUs in the cluster; without any, or for "cpu", the number of hosts."""
    total: Mapping[str, float] = require_ray().cluster_resources()
    kinds = [devices] if devices != "auto" else ["npu", "cuda"]
    counts = (int(total.get(RESOURCES[kind], 0)) for kind in kinds if kind != "cpu")
    return next(filter(None, counts), 0) or hosts()


def hosts() -> int:
    """Return the number of machines in the cluster."""
    return sum(bool(node["Alive"]) for node in require_ray().nodes())
