"""The content of a container for each of the two engines: command, environment, mounts and devices.

Sources: the vllm-ascend quick start (device nodes and mounts) and its Qwen-VL-Dense recipe (flags and environment).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from qvl.ascend import chips, matrix, parallel
from qvl.ascend.checks import fit
from qvl.ascend.checks import weights as checkpoints
from qvl.ascend.devices import numbers_of
from qvl.config import in_home
from qvl.errors import ConfigError

ENGINES: Final = ("qvl", "vllm")
KEY_NAMES: Final = {"qvl": "QVL_API_KEY", "vllm": "VLLM_API_KEY"}
READY_PATHS: Final = {"qvl": "/ready", "vllm": "/health"}
INNER_PORT: Final = 8000
CODE_FOLDER: Final = "/workspace/qvl"
CACHE_FOLDER: Final = "/var/cache/qvl"
_OWN_OPTIONS: Final = ("--entrypoint", "--name", "--net", "--network")
# What follows the address and port of the plan; another value would leave the published port without a server.
_OWN_FLAGS: Final = ("--host", "--port", "--uds", "--headless")
_DRIVER_LIBRARIES: Final = "/usr/local/Ascend/driver/lib64"
# Whose quantised checkpoints on the hubs are by ModelSlim; others that are named so have another form.
_MODEL_SLIM_OWNERS: Final = ("eco-tech", "vllm-ascend")


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """One container: model, engine, NPUs, image, and the published address.

    `model` is a folder of this host or a hub id. `host` is the address on which the port is published.
    `kind` is that of the chip's row, or "" to find it by `chip`, npu-smi's name, if known; `nodes` are the host's names
    below /dev, which tell kinds of one name apart, `files` those of `chips.looked_for()` that it has, and `memory_mb`
    is the memory of the smallest of `npus` in MiB, 0 if unknown. `env` are NAME=VALUE, or NAME to take the host's
    value; `mounts` are HOST:CONTAINER with an optional :ro; `docker_args` are further arguments of docker run; `extra`
    those of the engine.
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
    files: tuple[str, ...] = ()
    memory_mb: int = 0
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
        for option, text in {"MODEL": self.model, "--host": self.host, "--network": self.network}.items():
            if (
                not text.isprintable()
                or (option == "--host" and not text)
                or (option != "MODEL" and re.search(r"[^\w.:-]", text))
            ):
                raise ConfigError(f"{option} {text!r} cannot be read", hint="without blanks and control characters")
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
        if self.engine == "vllm":
            parallel.check(len(self.npus), self.extra, heads=fit.heads_of(self.weights or self.model), model=self.model)
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
    def need(self) -> fit.MemoryNeed | None:
        """The doctor's estimate of the model's memory; None if the model or the NPUs' memory is not known."""
        return fit.need_of(self.weights or self.model, self.chip_facts.max_model_len) if self.memory_mb else None

    @property
    def sharing(self) -> int:
        """The number of NPUs that share the model: in vllm all that its sizes let, one in qvl-serve."""
        return parallel.spread(len(self.npus), self.extra).sharing if self.engine == "vllm" else 1

    @property
    def longest_and_most(self) -> tuple[int, int]:
        """(tokens of the longest context, requests at once) of the chip's recipe; fewer if the memory holds fewer."""
        chip, need = self.chip_facts, self.need
        if need is None:
            return chip.max_model_len, chip.max_num_seqs
        tokens = need.tokens_in(self.sharing, fit.room_in(self.memory_mb))
        longest = max(tokens // 1024 * 1024, fit.SHORTEST_CONTEXT)
        return min(longest, chip.max_model_len), max(1, min(tokens // fit.REQUEST_TOKENS, chip.max_num_seqs))

    @property
    def visible(self) -> str:
        """The value of ASCEND_RT_VISIBLE_DEVICES inside the container, such as "0,1".

        It counts the nodes that the container has: those given to it, or in a privileged one all of the host's, among
        which there may be gaps.
        """
        if not (self.privileged or self.chip_facts.privileged):
            return ",".join(map(str, range(len(self.npus))))
        nodes = numbers_of(self.nodes)
        return ",".join(str(nodes.index(number) if number in nodes else number) for number in self.npus)

    @property
    def model_slim(self) -> bool:
        """Return whether ModelSlim quantised the weights: by its file in the folder, or by a publisher's hub id."""
        if self.weights:
            return checkpoints.model_slim(self.weights) is not None
        owner, _, name = self.model.partition("/")
        return owner.lower() in _MODEL_SLIM_OWNERS and re.search(r"w\d+a\d+", name, re.IGNORECASE) is not None


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


def driver_mounts(plan: ContainerPlan) -> list[tuple[str, str]]:
    """Return (host file, container file) of each driver file; of those that hosts may lack, the ones that exist."""
    chip = plan.chip_facts
    mounts = [(path, path) for path in chip.mounts]
    for target, places in chip.placed_mounts:
        mounts.append((next((place for place in places if place in plan.files), places[0]), target))
    return [*mounts, *((path, path) for path in chip.optional_mounts if path in plan.files)]


def volumes(plan: ContainerPlan) -> list[tuple[str, str, bool]]:
    """Return (host folder, container folder, read-only) of each mount, the driver's first."""
    mounts = [(source, target, True) for source, target in driver_mounts(plan)]
    if plan.weights:
        mounts.append((str(plan.weights), plan.inner_model, True))
    mounts.append((plan.hub_cache, "/root/.cache", False))
    if plan.answers:
        mounts.append((plan.answers, CACHE_FOLDER, False))
    if plan.code:
        mounts.append((plan.code, CODE_FOLDER, True))
    return mounts


def notes(plan: ContainerPlan) -> list[str]:
    """Return what a person should know before the start: limits that the memory sets, and weights of another form."""
    chip = plan.chip_facts
    said: list[str] = []
    if plan.engine != "vllm":
        return said
    longest, most = plan.longest_and_most
    fewer = [f"--max-model-len {longest} and not {chip.max_model_len}"] if longest < chip.max_model_len else []
    fewer += [f"--max-num-seqs {most} and not {chip.max_num_seqs}"] if most < chip.max_num_seqs else []
    if plan.need is not None and fewer:
        said.append(f"{plan.need}; {fit.given(plan.sharing, fit.room_in(plan.memory_mb))}: {', '.join(fewer)}")
    if not plan.model_slim and (text := chip.on_other_weights(plan.model)):
        said.append(text)
    return said


def refuse_other_image(plan: ContainerPlan) -> None:
    """Raise ConfigError if the image's tag says that it is of another chip, or too old for the chip."""
    chip, match = plan.chip_facts, re.search(r"vllm-ascend:v?(\d[\w.]*)", plan.image)
    if not (plan.kind or plan.chip):
        return
    if not chip.fits_image(plan.image):
        endings = " or ".join(f"-{suffix}" if suffix else "no chip" for suffix in chip.image_suffixes)
        raise ConfigError(
            f"--image {plan.image} is for another chip than {chip.kind}, whose tags end in {endings}",
            hint="take the image of this chip; --skip-check image takes this one",
        )
    if match and matrix.key(match[1]) < matrix.key(chip.serves_from):
        raise ConfigError(
            f"--image {plan.image} does not serve Qwen3-VL on {chip.kind}: {chip.serves_from} or newer does",
            hint="take a newer image; --skip-check image takes this one",
        )


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
    """Return (entrypoint, arguments): a shell that sets up CANN and runs the command, not what the image has there.

    Where the chip needs a program of the image first, that is the entrypoint, and the shell is its argument.
    """
    words = ["bash", "-c", _preamble(plan.chip_facts), "--", *command(plan)]
    return (plan.chip_facts.entrypoint, words) if plan.chip_facts.entrypoint else (words[0], words[1:])


def _preamble(chip: chips.Chip) -> str:
    # A container's command does not go through a login shell, so the image's ~/.bashrc, which does this, is not read.
    further = "".join(f":{folder}" for folder in chip.libraries)
    return (
        f"d={_DRIVER_LIBRARIES}; export LD_LIBRARY_PATH=$d:$d/common:$d/driver{further}:$LD_LIBRARY_PATH; "
        "for f in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh "
        '/usr/local/Ascend/nnal/atb/set_env.sh; do if [ -f "$f" ]; then . "$f"; fi; done; exec "$@"'
    )


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
    longest, most = plan.longest_and_most
    sizes = parallel.spread(len(plan.npus), plan.extra)
    batches = (chip.parallel_graph_sizes if sizes.tensor > 1 else ()) or chip.graph_sizes
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches}
    words = ["vllm", "serve", plan.inner_model, "--host", plan.inner_host, "--port", str(plan.inner_port)]
    words += ["--served-model-name", plan.label, "--dtype", chip.dtypes[0]]
    words += ["--tensor-parallel-size", str(sizes.tensor), "--max-model-len", str(longest)]
    words += ["--max-num-seqs", str(most), "--max-num-batched-tokens", str(chips.STEP_TOKENS)]
    words += ["--gpu-memory-utilization", str(chips.MEMORY_SHARE)]
    # vllm-ascend's recipe switches both caches off for Qwen3-VL: they have given garbled answers on NPUs.
    # Its table keeps them for mixtures of experts.
    words += [] if plan.sparse else ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    words += ["--enable-expert-parallel"] if plan.sparse and chip.expert_parallel and len(plan.npus) > 1 else []
    words += ["--async-scheduling", "--limit-mm-per-prompt.video", "0"]
    words += ["--enforce-eager"] if plan.eager else ["--compilation-config", json.dumps(graphs)]
    if plan.model_slim:
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
