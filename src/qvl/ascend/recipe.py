"""The content of a container for each of the two engines: command, environment, mounts and devices.

Sources: the vllm-ascend quick start (device nodes and mounts) and its Qwen-VL-Dense recipe (flags and environment).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from qvl.ascend import chips, matrix
from qvl.ascend.checks import weights as checkpoints
from qvl.config import in_home
from qvl.errors import ConfigError

ENGINES: Final = ("qvl", "vllm")
DEVICE_NODES: Final = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
DRIVER_MOUNTS: Final = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
)
KEY_NAMES: Final = {"qvl": "QVL_API_KEY", "vllm": "VLLM_API_KEY"}
READY_PATHS: Final = {"qvl": "/ready", "vllm": "/health"}
INNER_PORT: Final = 8000
CODE_FOLDER: Final = "/workspace/qvl"
CACHE_FOLDER: Final = "/var/cache/qvl"
_OWN_OPTIONS: Final = ("--entrypoint", "--name", "--net", "--network")
# What follows the address and port of the plan; another value would leave the published port without a server.
_OWN_FLAGS: Final = ("--host", "--port", "--uds", "--headless")
_DRIVER_LIBRARIES = "/usr/local/Ascend/driver/lib64"
# A container's command does not go through a login shell, so an image's ~/.bashrc, which sources these, is not read.
_PREAMBLE = (
    f"d={_DRIVER_LIBRARIES}; export LD_LIBRARY_PATH=$d:$d/common:$d/driver:$LD_LIBRARY_PATH; "
    "for f in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh "
    '/usr/local/Ascend/nnal/atb/set_env.sh; do if [ -f "$f" ]; then . "$f"; fi; done; exec "$@"'
)


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """One container: model, engine, NPUs, image, and the published address.

    `model` is a folder of this host or a hub id. `host` is the address on which the port is published.
    `kind` is that of the chip's row, or "" to find it by `chip`, npu-smi's name, if known;
    `nodes` are the host's names below /dev, which tell kinds of one name apart, and
    `tool` is the host's npu-smi. `env` are NAME=VALUE, or NAME to take the host's value; `mounts` are HOST:CONTAINER
    with an optional :ro; `docker_args` are further arguments of docker run; `extra` those of the engine.
    Raises ConfigError for invalid values.
    """

    model: str
    image: str
    npus: tuple[int, ...]
    engine: str = "qvl"
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = ""
    chip: str = ""
    kind: str = ""
    shm: str = ""
    hub_cache: str = "/root/.cache"
    answers: str = ""
    code: str = ""
    restart: str = "no"
    privileged: bool = False
    with_key: bool = False
    nodes: tuple[str, ...] = ()
    tool: str = chips.TOOLS[0]
    env: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    docker_args: tuple[str, ...] = ()
    network: str = ""
    extra: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"unknown --engine {self.engine!r}", hint=f"one of {', '.join(ENGINES)}")
        if not self.npus:
            raise ConfigError("no NPU given", hint="--npus 0")
        if not 0 < self.port < 65536:
            raise ConfigError(f"invalid --port {self.port}", hint="1 to 65535")
        if not re.fullmatch(r"[^\s:]+(:\d+/[^\s:]+)?(:[\w][\w.-]*|@sha256:[0-9a-f]{64})", self.image):
            raise ConfigError(f"--image {self.image!r} has no tag", hint="name one, such as vllm-ascend:v0.23.0")
        if self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]+", self.name):
            raise ConfigError(
                f"--name {self.name!r} is not a name for docker", hint="letters, digits and _ . -, 2 or more"
            )
        if self.shm and not re.fullmatch(r"[1-9][0-9]{0,14}([.][0-9]{1,3})?([kmgt]i?)?b?", self.shm, re.I):
            raise ConfigError(f"--shm-size {self.shm!r} is not a size", hint="a number and b, k, m or g, such as 10g")
        if not re.fullmatch(r"no|always|unless-stopped|on-failure(:[0-9]{1,9})?", self.restart):
            raise ConfigError(
                f"unknown --restart {self.restart!r}",
                hint="one of no, always, unless-stopped, on-failure, on-failure:5",
            )
        self._check_further()
        own = {"MODEL": str(self.weights or ""), "--hub-cache": self.hub_cache, "--answers": self.answers}
        for option, path in {**own, "--code": self.code}.items():
            if ":" in path:
                raise ConfigError(f"{option} {path}: docker cannot mount a path with ':'", hint="rename it, or link it")
        if self.chip_facts.why_not:
            raise ConfigError(f"{self.chip}: {self.chip_facts.why_not}", hint="--chip names another, if this is wrong")
        if self.engine == "vllm" and len(self.npus) % self.chip_facts.dies:
            raise ConfigError(
                f"{self.chip} works in pairs of dies, but --npus names {len(self.npus)}", hint="give both: 0,1"
            )
        if self.engine == "qvl" and len(self.npus) > 1 and "--replicas" not in self.extra:
            raise ConfigError(
                f"qvl-serve uses one NPU, but --npus names {len(self.npus)}",
                hint="--compose for one instance per NPU, --engine vllm for tensor parallel, or pass -- --replicas",
            )

    def _check_further(self) -> None:
        """Refuse what cannot be read in --env, --mount and --docker-arg, and what qvl launch sets, also after --."""
        for text in self.env:
            name = text.partition("=")[0]
            # Not the text itself: its value may be a key.
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=.*)?", text, re.DOTALL):
                raise ConfigError(f"--env {name!r} cannot be read", hint="as --env NAME=VALUE, or --env NAME")
            if name in KEY_NAMES.values():
                hint = f"export {name} in this shell: it is passed on by name, so that no command line shows the key"
                raise ConfigError(f"--env {name}: the key is not for the command line", hint=hint)
            if name == "ASCEND_RT_VISIBLE_DEVICES":
                raise ConfigError(f"--env {name} is set by qvl launch itself", hint="--npus chooses the NPUs")
        own_targets = {target for _, target, _ in volumes(self)}
        for text in self.mounts:
            if not re.fullmatch(r"/[^:]*:/[^:]*(:ro|:rw)?", text):
                raise ConfigError(f"--mount {text!r} cannot be read", hint="as --mount /on/host:/in/container:ro")
            target = text.split(":")[1]
            if target.rstrip("/") in own_targets:
                hint = "mount it elsewhere; --hub-cache, --answers and --code name what is mounted there"
                raise ConfigError(f"--mount {target} is mounted by qvl launch itself", hint=hint)
        for text in self.docker_args:
            if text.partition("=")[0] in _OWN_OPTIONS:
                raise ConfigError(f"--docker-arg {text} is set by qvl launch itself", hint="see --name and --network")
            if not re.match(r"--?[A-Za-z]", text):
                raise ConfigError(
                    f"--docker-arg {text!r} is not an option: docker would take it for the image",
                    hint="write option and value as one: --docker-arg=--ulimit=core=0",
                )

        for word in self.extra:
            flag = word.partition("=")[0].replace("_", "-")
            # vLLM's parser also takes the beginning of a flag.
            if len(flag) > 3 and any(own.startswith(flag) for own in _OWN_FLAGS):
                raise ConfigError(
                    f"-- {flag}: the published port would lead nowhere",
                    hint="--port and --host before -- choose where the service is published",
                )

    @property
    def container(self) -> str:
        """The container's name: `name` if set, else engine and port, which are unique: `qvl-vllm-8000`."""
        return self.name or f"qvl-{self.engine}-{self.port}"

    @property
    def weights(self) -> Path | None:
        """The model's folder on this host, None for a hub id."""
        path = in_home(self.model)
        return path.resolve() if path.is_dir() or self.model.startswith(("/", "./", "../", "~")) else None

    @property
    def inner_host(self) -> str:
        """The address that the engine listens on: all of the container, or the plan's own in the host's network."""
        return self.host if self.network == "host" else "0.0.0.0"  # noqa: S104

    @property
    def inner_port(self) -> int:
        """The port that the engine listens on: the published one in the host's network, which publishes none."""
        return self.port if self.network == "host" else INNER_PORT

    @property
    def inner_model(self) -> str:
        """The engine's model argument: the folder in the container, or the hub id."""
        return f"/models/{self.weights.name}" if self.weights else self.model

    @property
    def label(self) -> str:
        """The model's name in the API."""
        return self.served_name or PurePosixPath(self.inner_model).name

    @property
    def shm_size(self) -> str:
        """The size of shared memory as docker writes it: the plan's own, else the recipe's for the chip."""
        return self.shm or self.chip_facts.shm

    @property
    def chip_facts(self) -> chips.Chip:
        """The row of the chip, of 910B if the chip is not known."""
        return chips.named(self.kind) or chips.find(self.chip, self.nodes) or chips.DEFAULT

    @property
    def eager(self) -> bool:
        """Return whether the chip's graphs do not run on the image's CANN, by the matrix and the image's tag."""
        match = re.search(r"vllm-ascend:v?([\w.]+)", self.image)
        row = matrix.load().release(match[1]) if match and self.chip_facts.graph_cann else None
        cann = matrix.load().vllm_ascend[row].get("cann") if row else None
        return cann is not None and matrix.key(cann) < matrix.key(self.chip_facts.graph_cann)

    @property
    def sparse(self) -> bool:
        """Return whether the model is a mixture of experts: by its config.json, or a hub id like Qwen3-VL-30B-A3B."""
        return checkpoints.is_sparse(self.weights) if self.weights else bool(re.search(r"\dB-A\d+B", self.model))

    @property
    def visible(self) -> str:
        """The value of ASCEND_RT_VISIBLE_DEVICES inside the container, such as "0,1".

        An ordinary container numbers its NPUs from 0, a privileged one as the host does.
        """
        numbers = self.npus if self.privileged or self.chip_facts.privileged else range(len(self.npus))
        return ",".join(map(str, numbers))


def environment(plan: ContainerPlan) -> dict[str, str]:
    """Return environment variables with values, but without API keys: docker passes those by name."""
    variables = {
        "ASCEND_RT_VISIBLE_DEVICES": plan.visible,
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "1",
        "OMP_PROC_BIND": "false",
        "OMP_NUM_THREADS": "1",
    }
    if plan.engine == "vllm":
        return {**variables, "HCCL_OP_EXPANSION_MODE": "AIV"}
    variables |= {"ACL_OP_COMPILER_CACHE_MODE": "enable", "ACL_OP_COMPILER_CACHE_DIR": "/root/.cache/acl"}
    return {**variables, "PYTHONPATH": f"{CODE_FOLDER}/src"} if plan.code else variables


def volumes(plan: ContainerPlan) -> list[tuple[str, str, bool]]:
    """Return (host folder, container folder, read-only) of each mount, the driver's first."""
    chip = plan.chip_facts
    paths = DRIVER_MOUNTS if chip.mounts == chips.DEFAULT.mounts else (*chip.mounts, chips.TOOLS[0])
    # The tool is where this host has it; in the container its place is the usual one.
    mounts = [(plan.tool if path == chips.TOOLS[0] else path, path, True) for path in paths]
    if plan.weights:
        mounts.append((str(plan.weights), plan.inner_model, True))
    mounts.append((plan.hub_cache, "/root/.cache", False))
    if plan.answers:
        mounts.append((plan.answers, CACHE_FOLDER, False))
    if plan.code:
        mounts.append((plan.code, CODE_FOLDER, True))
    return mounts


def absent_folders(plan: ContainerPlan) -> list[tuple[str, str]]:
    """Return (option, folder) of each host folder to mount that does not exist."""
    folders = {"MODEL": plan.weights, "--hub-cache": plan.hub_cache, "--answers": plan.answers, "--code": plan.code}
    return [(option, str(folder)) for option, folder in folders.items() if folder and not Path(folder).is_dir()]


def devices(plan: ContainerPlan) -> list[str]:
    """Return the device nodes of the plan's NPUs, and the control nodes."""
    chip = plan.chip_facts
    names = (*chip.control_nodes, *(node for node in chip.optional_nodes if node in plan.nodes))
    return [*(f"/dev/davinci{number}" for number in plan.npus), *(f"/dev/{name}" for name in names)]


def command(plan: ContainerPlan) -> list[str]:
    """Return the command line of the engine."""
    return _vllm(plan) if plan.engine == "vllm" else _qvl(plan)


def shell(plan: ContainerPlan) -> tuple[str, list[str]]:
    """Return (entrypoint, arguments): a shell, not the image's own, that sets up CANN and runs the command."""
    return "bash", ["-c", _PREAMBLE, "--", *command(plan)]


def ready_script(engine: str) -> str:
    """Return the Python code of a health check inside the container: exit code 0 once the service is ready.

    /ready needs the API key, if any, which a plain HTTP health check cannot send.
    """
    url = f"http://127.0.0.1:{INNER_PORT}{READY_PATHS[engine]}"
    key = f"'Bearer ' + os.environ.get('{KEY_NAMES[engine]}', '')"
    return (
        f"import os, urllib.request as r; r.urlopen(r.Request('{url}', headers={{'Authorization': {key}}}), timeout=4)"
    )


def _qvl(plan: ContainerPlan) -> list[str]:
    # With the code mounted there is no console script of it; the module is the same program.
    program = ["python3", "-m", "qvl.cli.serve"] if plan.code else ["qvl-serve"]
    words = [*program, plan.inner_model, "--host", plan.inner_host, "--port", str(plan.inner_port), "--device", "npu"]
    words += ["--dtype", plan.chip_facts.dtypes[0], "--served-model-name", plan.label]
    if plan.answers:
        words += ["--cache", f"sqlite:///{CACHE_FOLDER}/answers.db"]
    if not plan.with_key:
        words.append("--allow-unauthenticated")
    return [*_without(words, plan.extra), *plan.extra]


def _vllm(plan: ContainerPlan) -> list[str]:
    chip = plan.chip_facts
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    words = ["vllm", "serve", plan.inner_model, "--host", plan.inner_host, "--port", str(plan.inner_port)]
    words += ["--served-model-name", plan.label, "--dtype", chip.dtypes[0]]
    words += ["--tensor-parallel-size", str(len(plan.npus)), "--max-model-len", str(chip.max_model_len)]
    words += ["--max-num-seqs", "128", "--max-num-batched-tokens", str(chips.STEP_TOKENS)]
    words += ["--gpu-memory-utilization", str(chips.MEMORY_SHARE)]
    # vllm-ascend's recipe switches both caches off for Qwen3-VL: they have given garbled answers on NPUs.
    # Its table keeps them for mixtures of experts.
    words += [] if plan.sparse else ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    words += ["--async-scheduling", "--limit-mm-per-prompt.video", "0"]
    words += ["--enforce-eager"] if plan.eager else ["--compilation-config", json.dumps(graphs)]
    if plan.weights and checkpoints.model_slim(plan.weights) is not None:
        words += ["--quantization", "ascend"]
    if not chip.npugraph_ex:
        words += ["--additional-config", json.dumps({"ascend_compilation_config": {"enable_npugraph_ex": False}})]
    return [*_without(words, plan.extra), *plan.extra]


def _without(words: list[str], extra: tuple[str, ...]) -> list[str]:
    """Return `words` without the flags, and their values, that `extra` gives again."""
    given = {word.partition("=")[0] for word in extra if word.startswith("--")}
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in given or word.replace("--no-", "--", 1) in given or f"--no-{word[2:]}" in given
        if not skipping:
            kept.append(word)
    return kept
