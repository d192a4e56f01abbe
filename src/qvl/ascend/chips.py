"""What differs between Ascend chips: names, number types, device nodes, mounts, images; no other table has it.

Sources: vllm-ascend's installation page, quick start and tutorials (Qwen-VL-Dense, Qwen3.5-Dense), the chip types of
its build, and the vendor's published source of npu-smi. The memory of a chip is in none of them: npu-smi tells it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

_DRIVER: Final = "/usr/local/Ascend/driver"
TOOLS: Final = ("/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi")
_MOUNTS: Final = ("/usr/local/dcmi", f"{_DRIVER}/lib64", f"{_DRIVER}/version.info", "/etc/ascend_install.info")
_TOOL: Final = (TOOLS[0], TOOLS)
_YAML: Final = "/usr/lib64/libyaml-0.so.2"


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of chip, and what a container on it needs. Nodes are names below /dev, mounts are paths of the host.

    Args:
        kind: the name that messages use, such as `910B`.
        products: what the vendor sells with it.
        names: a pattern of the name in npu-smi, without `Ascend`.
        dtypes: what it computes in, the preferred one first.
        control_nodes: the nodes beside /dev/davinciN that every process needs.
        optional_nodes: nodes that a container gets if the host has them.
        mounts: driver files that a container needs.
        placed_mounts: those that hosts keep in different places: (place in the container, places on a host), of which
            the first that exists is mounted.
        optional_mounts: further files that a container gets if the host has them.
        privileged: the vendor's container is privileged.
        entrypoint: the program of vllm-ascend's image that must start first, with the command as its arguments; "" if
            none has to.
        libraries: folders in the container that the loader needs beside the driver's.
        build: the device type in vllm-ascend's `_build_info.py`; "" if vllm-ascend does not run on the chip.
        kernels: the chip's name in CANN's folder of kernels; further letters may follow it.
        image_suffixes: endings of vllm-ascend's image tags for it, the usual one first; "" is a tag without one.
        serves_from: the first vllm-ascend that serves Qwen3-VL on it.
        graph_cann: the oldest CANN whose graphs run; below it vllm needs `--enforce-eager`. "" if any.
        npugraph_ex: the graph option of that name works.
        expert_parallel: several NPUs may divide the experts of a mixture among them.
        dies: dies on a card, which are /dev/davinciN each and are used together.
        max_model_len: the context that vllm-ascend's recipe allows.
        max_num_seqs: the requests at once that it allows.
        graph_sizes: the sizes of batches that it captures as graphs.
        parallel_graph_sizes: those where several NPUs share the model, if they are fewer.
        shm: the shared memory of its container, as docker writes it.
        port_range_limit: where HCCL_NPU_SOCKET_PORT_RANGE does not work on it; "" if it works everywhere.
        quantisation: the form of the quantised weights that vllm-ascend's recipe serves; "" if it serves plain ones.
        why_not: the reason why qvl and vllm-ascend do not run on it; "" if they do.
    """

    kind: str
    products: str
    names: str
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    control_nodes: tuple[str, ...] = ("davinci_manager", "devmm_svm", "hisi_hdc")
    optional_nodes: tuple[str, ...] = ()
    mounts: tuple[str, ...] = _MOUNTS
    placed_mounts: tuple[tuple[str, tuple[str, ...]], ...] = (_TOOL,)
    optional_mounts: tuple[str, ...] = ()
    privileged: bool = False
    entrypoint: str = ""
    libraries: tuple[str, ...] = ()
    build: str = ""
    kernels: str = ""
    image_suffixes: tuple[str, ...] = ()
    serves_from: str = ""
    graph_cann: str = ""
    npugraph_ex: bool = True
    expert_parallel: bool = True
    dies: int = 1
    max_model_len: int = 32768
    max_num_seqs: int = 128
    graph_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    parallel_graph_sizes: tuple[int, ...] = ()
    shm: str = "1g"
    port_range_limit: str = ""
    quantisation: str = ""
    why_not: str = ""

    @property
    def has_version_info(self) -> bool:
        """True if the driver of the chip keeps its version in version.info; a root complex has it in its system."""
        return bool({_DRIVER, f"{_DRIVER}/version.info"} & {*self.mounts})

    @property
    def supported(self) -> bool:
        """True if vllm-ascend has a build for the chip, on which qvl relies."""
        return not self.why_not

    def on_other_weights(self, model: str) -> str:
        """Return what to say where ModelSlim did not quantise `model`; "" if the chip's recipe serves plain weights."""
        if not self.quantisation:
            return ""
        return (
            f"{model} is not in {self.quantisation}, in which vllm-ascend's recipe for {self.kind} serves Qwen3-VL; "
            f"ModelScope has such weights: Eco-Tech/Qwen3-VL-8B-Instruct-{self.quantisation}"
        )

    def fits_image(self, image: str) -> bool:
        """Return whether vllm-ascend's image of this tag is for the chip; True for a tag of another kind."""
        suffix = image_suffix(image)
        return suffix is None or not self.image_suffixes or suffix in self.image_suffixes


# A part of a chip that is divided (vNPU), such as vir04_3c.
_PART: Final = r"(vir\w+)?"
_PLAIN_310P: Final = ("float16",)
# Its tutorials disagree (8, 32 and 128 requests at once); these numbers are from the one for all products with the
# chip. With several NPUs its driver has events for two graphs only.
_REQUESTS_310P: Final = 32
_GRAPHS_310P: Final = (1, 2, 4, 8, 16)
_PARALLEL_GRAPHS_310P: Final = (1, 8)
CHIPS: Final = (
    Chip(
        kind="910B",
        products="Atlas 800T/800I A2, 300I A2, 900 A2 PoD",
        names=rf"910B[1-4](C|-1)?{_PART}",
        build="A2",
        kernels="ascend910b",
        image_suffixes=("",),
        port_range_limit="not with fused communication",
        serves_from="0.11.0",
    ),
    Chip(
        kind="A3",
        products="Atlas 800T/800I A3, 900 A3 SuperPoD",
        names=rf"910(C|_93\d\d)?{_PART}",
        build="A3",
        kernels="ascend910_93",
        image_suffixes=("a3",),
        serves_from="0.11.0",
        dies=2,
    ),
    Chip(
        kind="310P",
        products="Atlas 300I Duo, 300I Pro, 300V",
        names=rf"310P\d?{_PART}",
        dtypes=_PLAIN_310P,
        build="310P",
        kernels="ascend310p",
        image_suffixes=("310p",),
        serves_from="0.18.0",
        graph_cann="9.0.0",
        npugraph_ex=False,
        expert_parallel=False,
        max_model_len=16384,
        max_num_seqs=_REQUESTS_310P,
        graph_sizes=_GRAPHS_310P,
        parallel_graph_sizes=_PARALLEL_GRAPHS_310P,
        shm="10g",
    ),
    Chip(
        kind="310P RC",
        products="Atlas 200I Pro and other 310P as root complex",
        names=rf"310P\d?{_PART}",
        dtypes=_PLAIN_310P,
        control_nodes=("davinci_manager", "ascend_manager", "user_config"),
        mounts=(
            "/etc/sys_version.conf",
            "/etc/ld.so.conf.d/mind_so.conf",
            "/etc/hdcBasic.cfg",
            "/etc/slog.conf",
            "/var/dmp_daemon",
            "/var/slogd",
            f"{_DRIVER}/lib64",
            "/usr/lib64/libmmpa.so",
            "/usr/lib64/libcrypto.so.1.1",
            "/usr/lib64/libstackcore.so",
            "/usr/lib64/libtensorflow.so",
        ),
        # Ubuntu and openEuler keep libyaml in different places; the driver's tools look for it in this one.
        placed_mounts=(_TOOL, (_YAML, ("/usr/lib/aarch64-linux-gnu/libyaml-0.so.2", _YAML, f"{_YAML}.0.9"))),
        optional_mounts=("/usr/lib64/libsemanage.so.2",),
        privileged=True,
        # Without a card on PCIe it starts slogd and dmp_daemon, which the driver needs there.
        entrypoint="/usr/local/bin/entrypoint.sh",
        libraries=("/usr/lib64", "/root/aicpu_kernels/0/aicpu_kernels_device/sand_box"),
        build="310P",
        kernels="ascend310p",
        image_suffixes=("310p",),
        serves_from="0.23.0rc1",
        graph_cann="9.0.0",
        npugraph_ex=False,
        expert_parallel=False,
        max_model_len=16384,
        max_num_seqs=_REQUESTS_310P,
        graph_sizes=_GRAPHS_310P,
        parallel_graph_sizes=_PARALLEL_GRAPHS_310P,
        shm="10g",
    ),
    Chip(
        kind="950",
        products="Ascend 950PR and 950DT (Atlas 350, Atlas 850)",
        names=r"950\w*",
        control_nodes=("davinci_manager", "hisi_hdc", "ummu", "uburma"),
        # The vendor's pages disagree on this node: it is used where the host has it, and not missed where not.
        optional_nodes=("devmm_svm",),
        mounts=("/usr/local/dcmi", _DRIVER, "/etc/ascend_install.info"),
        # Some of the vendor's pages mount all of /usr/lib64 too, newer ones do not: it hides the image's libraries.
        optional_mounts=("/etc/hccl_rootinfo.json", "/etc/hixlep", "/usr/bin/urma_admin", "/lib/route.conf"),
        privileged=True,
        build="A5",
        kernels="ascend950",
        image_suffixes=("a5", "950dt"),
        serves_from="0.23.0rc1",
        quantisation="w8a8-mxfp8",
    ),
    Chip(
        kind="910A",
        products="Atlas 300T, 800 (model 9000/9010)",
        names=r"910(A|B|ProA|ProB|PremiumA)",
        dtypes=("float16",),
        why_not="vllm-ascend has no build for the first 910 (910A, 910ProA, 910ProB), which also has no bfloat16",
    ),
    Chip(
        kind="310",
        products="Atlas 300I (model 3000/3010), 200I DK A2, 310B",
        names=r"310(B\d?)?",
        dtypes=("float16",),
        why_not="vllm-ascend has no build for 310 and 310B",
    ),
)
DEFAULT: Final = CHIPS[0]
# The context of a step and the share of memory of vllm-ascend's recipe for Qwen3-VL.
STEP_TOKENS: Final = 16384
MEMORY_SHARE: Final = 0.91
SUFFIXES: Final = frozenset(suffix for chip in CHIPS for suffix in chip.image_suffixes if suffix)
_TAG = re.compile(r"(?:^|/)vllm-ascend:([^@]+)")


def named(kind: str) -> Chip | None:
    """Return the row of a kind, such as `310P RC`, in either case; None if there is none of that name."""
    return next((chip for chip in CHIPS if chip.kind.lower() == kind.strip().lower()), None)


def find(name: str, nodes: Collection[str] = ()) -> Chip | None:
    """Return the facts about a chip by its name in npu-smi; None if there is no row.

    `nodes` are names below /dev: they tell a 310P as root complex from one on a card.
    """
    plain = re.sub(r"^\s*Ascend\s*", "", name, flags=re.IGNORECASE).strip()
    rows = [chip for chip in CHIPS if re.fullmatch(chip.names, plain, re.IGNORECASE)]
    return max(rows, key=lambda chip: len(set(chip.control_nodes) & set(nodes)), default=None)


def find_by_nodes(nodes: Collection[str]) -> Chip | None:
    """Return the chip that a host's nodes below /dev show without npu-smi; None where they fit several kinds."""
    if "uburma" in nodes or "ummu" in nodes:
        return next(chip for chip in CHIPS if chip.kind == "950")
    if not {"user_config", "ascend_manager"}.isdisjoint(nodes) and {"devmm_svm", "hisi_hdc"}.isdisjoint(nodes):
        return next(chip for chip in CHIPS if chip.kind == "310P RC")
    return None


def looked_for() -> tuple[str, ...]:
    """Return every file of the table that is mounted only if, or from where, a host has it."""
    placed = [place for chip in CHIPS for _, places in chip.placed_mounts for place in places]
    return tuple(dict.fromkeys([*placed, *(path for chip in CHIPS for path in chip.optional_mounts)]))


def kinds() -> str:
    """Return the supported kinds for a sentence: `910B, A3, 310P, 310P RC or 950`."""
    *names, last = [chip.kind for chip in CHIPS if chip.supported]
    return f"{', '.join(names)} or {last}"


def image_suffix(image: str) -> str | None:
    """Return the chip's part of a tag of vllm-ascend's image (`v0.23.0-a3-openeuler` has `a3`, `v0.23.0` has "").

    None for an image of another name, whose tags follow other rules.
    """
    match = _TAG.search(image)
    if match is None:
        return None
    parts = match[1].lower().split("-")[1:]
    return next((part for part in parts if part in SUFFIXES), "")
