"""The rows of public reports of failed bring-ups: what the host looked like, and what names the cause.

Every host is made up from the report's words; none was seen. A row is "named" where `qvl doctor` prints the cause as a
warning or failure, "explained" where `qvl doctor --explain` does for the code that the report shows, and "not named"
where it cannot.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.ascend.doctor import Options, examine
from qvl.ascend.explain import explanations
from tests.ascend.conftest import healthy_machine, of, recording
from tests.ascend.sized_host import GIB
from tests.ascend.test_probe import answer, script

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine

QUIET: Final = Options(probe=False)


@dataclass(frozen=True)
class Report:
    """One row: the threads, the cause, the check that names it, the words it must use, and how to make the host.

    `make` changes a healthy host with four 910B4 and returns the options of the examination, and changes of the Host.
    `explains` is a code for `--explain` instead of a check. `also` are checks that fail beside it for the same cause;
    no other may.
    """

    threads: str
    cause: str
    check: str = ""
    words: str = ""
    make: Callable[[Machine], tuple[Options, dict[str, object]]] | None = None
    explains: str = ""
    also: tuple[str, ...] = ()

    def failing(self, machine: Machine) -> set[str]:
        """Return the checks that fail on the row's host."""
        if self.make is None:
            return set()
        options, changes = self.make(machine)
        return {item.check for item in examine(machine.host(**changes), options).findings if item.status == "fail"}

    def printed(self, machine: Machine) -> str:
        """Return the lines that the command prints about the cause; "" if it does not name it."""
        if self.explains:
            return " ".join(f"{item.code}: {item.cause}" for item in explanations(self.explains)[:1])
        if self.make is None:
            return ""
        options, changes = self.make(machine)
        found = of(examine(machine.host(**changes), options).findings, self.check)
        return next(
            (item.summary for item in found if item.status in ("warn", "fail") and self.words in item.summary), ""
        )


def _no_driver(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.write("/.dockerenv")
    (machine.root / "usr/local/Ascend/driver/version.info").unlink()
    return QUIET, {}


def _no_set_env(machine: Machine) -> tuple[Options, dict[str, object]]:
    del machine.environ["ASCEND_HOME_PATH"]
    return QUIET, {}


def _engine(machine: Machine, plugin: str, vllm: str, cann: str, torch: str) -> None:
    machine.environ["ATB_HOME_PATH"] = "/usr/local/Ascend/nnal/atb/latest"
    for name, version in (("vllm-ascend", plugin), ("vllm", vllm), ("torch", torch), ("torch-npu", torch)):
        machine.replace_package(name, version)
    machine.software(cann)


def _keep_nodes(machine: Machine, *numbers: int) -> None:
    for number in {0, 1, 2, 3} - {*numbers}:
        (machine.root / f"dev/davinci{number}").unlink()


def _no_nnal(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.package("vllm-ascend", "0.11.0")
    return QUIET, {}


def _old_transformers(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.replace_package("transformers", "4.51.0")
    return QUIET, {}


def _old_cann(machine: Machine) -> tuple[Options, dict[str, object]]:
    _engine(machine, "0.11.0", "0.11.0", "8.2.RC1", "2.7.1")
    return QUIET, {}


def _mixed_candidates(machine: Machine) -> tuple[Options, dict[str, object]]:
    _engine(machine, "0.16.0rc1", "0.17.0", "8.5.1", "2.9.0")
    return QUIET, {}


def _used_elsewhere(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.write("/.dockerenv")
    machine.npu_smi("error-8020.txt", code=1)
    return QUIET, {}


def _held_elsewhere(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.write("/.dockerenv")
    machine.npu_smi("error-8005.txt", code=1)
    return QUIET, {}


def _visible_beyond(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "4"
    return QUIET, {}


def _gap_in_slots(machine: Machine) -> tuple[Options, dict[str, object]]:
    (machine.root / "dev/davinci2").unlink()
    machine.write("/dev/davinci4").chmod(0o660)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,3,4"
    return QUIET, {}


def _gap_in_choice(machine: Machine) -> tuple[Options, dict[str, object]]:
    lines = recording("24.1.rc3-910B4.txt").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| 0     910B4"))
    rows = [line.replace(f"| {number}     910B4", f"| {number + 4}     910B4") for number in range(4)
            for line in lines[first + 3 * number : first + 3 * number + 3]]  # fmt: skip
    text = "\n".join([*lines[: first + 12], *rows, *lines[first + 12 :]])
    machine.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    machine.nodes(*range(8))
    machine.package("vllm-ascend", "0.7.3rc2")
    machine.environ |= {"ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest", "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,5"}
    return QUIET, {}


def _port_taken(machine: Machine) -> tuple[Options, dict[str, object]]:
    row = "   0: 0100007F:EA60 00000000:0000 0A\n"
    machine.write("/proc/net/tcp", f"  sl  local_address rem_address   st\n{row}")
    return QUIET, {}


def _two_services(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.npu_smi("25.5.2-910B3.txt")
    return QUIET, {}


def _duo(machine: Machine) -> None:
    _keep_nodes(machine, 2, 3)
    machine.npu_smi("24.1.0.1-310P3.txt")


def _duo_old_image(machine: Machine) -> tuple[Options, dict[str, object]]:
    _duo(machine)
    _engine(machine, "0.10.0rc1", "0.10.0", "8.3.RC1", "2.7.1")
    return QUIET, {}


def _duo_masked(machine: Machine) -> tuple[Options, dict[str, object]]:
    _duo(machine)
    body = answer("npu:0", count=2)
    for item in body["operations"]:
        if item["op"] == "masked_assign":
            item["error"] = "RuntimeError: call aclnnIndexPutImpl failed, error code is 561103"
    return Options(), {"interpreter": script(machine, body, answer("npu:1")).interpreter}


def _first_910(machine: Machine) -> tuple[Options, dict[str, object]]:
    _keep_nodes(machine, 0)
    machine.npu_smi("22.0.4-910A.txt")
    return Options(probe=False, dtype="bfloat16"), {}


def _pro_b(machine: Machine) -> tuple[Options, dict[str, object]]:
    _keep_nodes(machine, 0)
    text = recording("22.0.4-910A.txt").replace("910A  ", "910ProB")
    machine.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    return QUIET, {}


def _build_of_another_chip(machine: Machine) -> tuple[Options, dict[str, object]]:
    _duo(machine)
    _engine(machine, "0.18.0", "0.18.0", "8.5.1", "2.9.0")
    path = machine.site / "vllm_ascend/_build_info.py"
    path.parent.mkdir()
    path.write_text("__device_type__ = 'A2'\n")
    return QUIET, {}


def _old_driver(machine: Machine) -> tuple[Options, dict[str, object]]:
    _engine(machine, "0.11.0", "0.11.0", "8.3.RC2", "2.7.1")
    return QUIET, {}


def _ray_and_small_shm(machine: Machine) -> tuple[Options, dict[str, object]]:
    machine.package("ray", "2.48.0")
    machine.write("/proc/meminfo", "MemTotal: 263921664 kB\n")
    return QUIET, {"sizes": {"/dev/shm": (9 * GIB, 9 * GIB)}}


def _small_shm(machine: Machine) -> tuple[Options, dict[str, object]]:
    return QUIET, {"sizes": {"/dev/shm": (64 * 2**20, 64 * 2**20)}}


def _root_complex(machine: Machine) -> tuple[Options, dict[str, object]]:
    _keep_nodes(machine, 0)
    for name in ("devmm_svm", "hisi_hdc"):
        (machine.root / "dev" / name).unlink()
    machine.write("/.dockerenv")
    machine.write("/dev/ascend_manager").chmod(0o660)
    machine.npu_smi("23.0.6-310P3-memory-na.txt")
    return QUIET, {}


def _new_chip(machine: Machine) -> tuple[Options, dict[str, object]]:
    _keep_nodes(machine, 0, 1)
    machine.npu_smi("25.6.0-950DT.txt")
    for name in ("ummu", "uburma"):
        machine.write(f"/dev/{name}").chmod(0o660)
    _engine(machine, "0.18.0", "0.18.0", "8.5.1", "2.9.0")
    machine.write("/usr/local/Ascend/ascend-toolkit/latest/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b/x.json")
    return QUIET, {}


def checkpoint(folder: Path, *, gib: float) -> Path:
    """Make the config of Qwen3-VL-8B beside a sparse file of `gib` GiB in place of its weights."""
    folder.mkdir()
    text = {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "depth": 27,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    body = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(body))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    _sparse_weights(folder / "model.safetensors", int(gib * GIB))
    return folder


def _sparse_weights(path: Path, size: int) -> None:
    """Write a safetensors file of `size` bytes that takes no space: a header, and a hole for its one tensor."""
    text = '{"w":{"dtype":"I8","shape":[%d],"data_offsets":[0,%d]}}'
    header = (text % ((size,) * 2)).encode()
    count = size - 8 - len(header)
    header = (text % ((count,) * 2)).encode().ljust(len(header))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(size)


def _too_large(machine: Machine) -> tuple[Options, dict[str, object]]:
    _keep_nodes(machine, 0)
    text = recording("23.0.6-310P3-memory-na.txt").replace("NA   / 21527 ", "1510 / 21527 ")
    machine.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    return Options(probe=False, weights=checkpoint(machine.root / "8b", gib=16.3)), {}


def _described_in_part(machine: Machine) -> tuple[Options, dict[str, object]]:
    folder = machine.root / "w8a8"
    folder.mkdir()
    names = ["model.layers.0.mlp.up_proj.weight", "visual.blocks.0.attn.qkv.weight"]
    (folder / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8", names[0]: "W8A8"}))
    index = {"weight_map": dict.fromkeys(names, "quant_model_weights-00001-of-00001.safetensors")}
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    checkpoint(folder / "plain", gib=0.001)
    for path in sorted((folder / "plain").iterdir()):
        path.rename(folder / path.name.replace("model.safetensors", "quant_model_weights-00001-of-00001.safetensors"))
    return Options(probe=False, weights=folder), {}


REPORTS: Final = (
    Report("vllm-ascend #1440", "driver not mounted (libascend_hal.so)", "driver", "cannot be read", _no_driver),
    Report("vllm-ascend #262", "set_env.sh not sourced (libhccl.so)", "set-env", "not set", _no_set_env),
    Report("vllm-ascend #152", "nnal missing (libatb.so)", "set-env-atb", "libatb.so", _no_nnal),
    Report("vllm-ascend #3819", "transformers without qwen3_vl", "transformers", "Qwen3-VL", _old_transformers),
    Report(
        "vllm-ascend #3901",
        "CANN 8.2.RC1 under vllm-ascend 0.11",
        "vllm-ascend",
        "cann 8.2.RC1",
        _old_cann,
        also=("torch-npu",),
    ),
    Report("vllm-ascend #7276", "vllm and vllm-ascend differ", "vllm-ascend", "vllm 0.17.0", _mixed_candidates),
    Report("vllm-ascend #632", "-8020: the NPU is used elsewhere", "npu-smi", "another container", _used_elsewhere),
    Report("vllm-ascend #2698", "-8005 in a container", "npu-smi", "another container", _held_elsewhere),
    Report("gpustack #3352", "a visible device that is not there", "visible-devices", "out of range", _visible_beyond),
    Report("vllm-ascend #10227", "gap in the slots", "visible-devices", "from 0", _gap_in_slots),
    Report(
        "vllm-ascend #449",
        "V1 engine with visible devices 0,1,2,5 (vllm-ascend of that day)",
        "visible-devices",
        "Invalid device id",
        _gap_in_choice,
        also=("chip-release",),
    ),
    Report("vllm-ascend #405", "HCCL's host port taken", "hccl-ports", "60000", _port_taken),
    Report("vllm-ascend #11968", "HCCL's port on the NPU taken", "hccl-npu-ports", "16666", _two_services),
    Report("vllm-ascend #5017", "300I Duo with an old image (conv3d)", "chip-release", "0.18.0", _duo_old_image),
    Report("vllm-ascend #4419", "310P: masked assignment", "op-probe", "masked_assign", _duo_masked),
    Report(
        "vllm-ascend #9294", "910A has no bfloat16", "dtype", "does not compute in bfloat16", _first_910, also=("chip",)
    ),
    Report("vllm-ascend #1047", "910ProB is not supported", "chip", "no build", _pro_b),
    Report(
        "vllm-ascend #6676, #5599, #1500", "A2 build on 310P", "chip-build", "built for 910B", _build_of_another_chip
    ),
    Report(
        "vllm-ascend #5468, #3190",
        "driver 24.1 under CANN 8.3: 507014 (#3190 names such a driver and shows no log)",
        "driver-cann",
        "drivers 24.1",
        _old_driver,
    ),
    Report("gpustack #5014", "/dev/shm of 9 GB with Ray", "shm-ray", "Ray", _ray_and_small_shm),
    Report("vllm #1710", "/dev/shm of 64 MB", "shm", "64 MiB", _small_shm),
    Report("vllm-ascend #8981", "310P as root complex, nodes missing", "device-nodes", "user_config", _root_complex),
    Report(
        "vllm-ascend #12141, #9677, #13086",
        "950 with software of 910B",
        "cann-kernels",
        "none for 950",
        _new_chip,
        also=("chip-release",),
    ),
    Report("vllm-ascend #11990", "graph capture fails with 207005", explains="error code is 207005"),
    Report("vllm-ascend #3965, #4678", "no memory left with pictures", "fit", "pictures", _too_large),
    Report(
        "vllm-ascend #7538, #8367",
        "W8A8: names missing",
        "quantisation",
        "does not name",
        _described_in_part,
        also=("weights",),
    ),
)

_HEAD: Final = """# Reports of failed bring-ups, and what `qvl doctor` says

Made by the tests (`make docs`): {rows} rows for {threads} public threads. Each is rebuilt from its words as a made-up
host, beside the line that `qvl doctor` (or `qvl doctor --explain CODE`) prints there. {named} of the {rows} causes are
named{others}. No NPU was used. The causes are those of the threads.

| report | cause | `qvl doctor` prints |
|---|---|---|
"""


def page(folder: Path) -> str:
    """Return the page of all reports; `folder` is for the made-up hosts."""
    lines = []
    for number, row in enumerate(REPORTS):
        place = folder / str(number)
        place.mkdir()
        printed = row.printed(healthy_machine(place))
        command = "`--explain`: " if row.explains else f"`{row.check}`: " if row.check else ""
        said = printed.replace(str(place), "").replace("|", "/") or "not named"
        lines.append(f"| {row.threads} | {row.cause} | {command}{said} |")
    threads = sum(len(row.threads.split(",")) for row in REPORTS)
    named = sum(not line.endswith("| not named |") for line in lines)
    others = '; the others say "not named"' if named < len(lines) else ""
    head = _HEAD.format(rows=len(REPORTS), threads=threads, named=named, others=others)
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[1]).write_text(page(Path(folder)), encoding="utf-8")
