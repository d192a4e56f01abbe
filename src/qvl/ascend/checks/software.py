"""Checks of CANN, set_env.sh and the Python packages against the version matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qvl.ascend import matrix
from qvl.ascend.checks.driver import fields
from qvl.ascend.host import Host
from qvl.ascend.report import Finding
from qvl.suggest import install_line

_TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
_MACHINES = ("aarch64-linux", "x86_64-linux", "arm64-linux")
_REPORTED = (
    "torch",
    "torch-npu",
    "transformers",
    "vllm",
    "vllm-ascend",
    "torchvision",
    "qwen-vl-utils",
    "triton-ascend",
)


def cann_version(host: Host) -> tuple[str, str] | None:
    """Return (version, folder) of the CANN toolkit, from the environment, else from the standard folders; else None."""
    home = host.environ.get("ASCEND_HOME_PATH") or host.environ.get("ASCEND_TOOLKIT_HOME")
    numbered = (f"/usr/local/Ascend/{name}" for name in host.names("/usr/local/Ascend") if name.startswith("cann-"))
    for folder in (*([home] if home else []), *_TOOLKITS, *numbered):
        for machine in _MACHINES:
            facts = fields(host.read(f"{folder}/{machine}/ascend_toolkit_install.info"))
            if facts.get("version"):
                return facts["version"], folder
    return None


def cann(host: Host) -> Iterator[Finding]:
    """Check that CANN is installed and its set_env.sh was sourced; likewise nnal/atb, if installed."""
    toolkit = cann_version(host)
    if toolkit is None:
        yield Finding.fail(
            "cann",
            "no CANN toolkit under /usr/local/Ascend",
            "install Ascend-cann-toolkit and the kernels of the chip, or use an image that has them",
        )
        return
    version, folder = toolkit
    yield Finding.ok("cann", f"CANN {version} in {folder}", {"version": version, "folder": folder})
    script = _set_env(host, folder)
    if not host.environ.get("ASCEND_HOME_PATH"):
        yield Finding.fail(
            "set-env",
            "CANN is installed but its environment is not set (ASCEND_HOME_PATH is empty)",
            f"source {script}",
            {"script": script},
        )
    else:
        yield Finding.ok("set-env", f"ASCEND_HOME_PATH is {host.environ['ASCEND_HOME_PATH']}")
    if host.path("/usr/local/Ascend/nnal/atb").is_dir() or host.environ.get("ATB_HOME_PATH"):
        if host.environ.get("ATB_HOME_PATH"):
            yield Finding.ok("set-env-atb", "nnal/atb is set up")
        else:
            text = "nnal/atb is installed but ATB_HOME_PATH is empty: libatb.so is not found"
            yield Finding.warn("set-env-atb", text, "source /usr/local/Ascend/nnal/atb/set_env.sh")
    elif "vllm-ascend" in host.packages():
        yield Finding.fail(
            "set-env-atb",
            "nnal/atb is not installed, whose libatb.so vllm-ascend loads",
            f"install Ascend-cann-nnal {version}, then source /usr/local/Ascend/nnal/atb/set_env.sh",
        )


def versions(host: Host, kind: str) -> Iterator[Finding]:
    """Check the versions of Python, torch, transformers, vllm and, on an NPU, torch_npu and CANN by the matrix."""
    table = matrix.load()
    packages = host.packages()
    detail = {name: packages[name] for name in _REPORTED if name in packages}
    yield from _python(host, kind, table)
    yield from _torch(packages, detail, kind)
    yield from _transformers(packages, table)
    if kind == "npu":
        toolkit = cann_version(host)
        yield from _torch_npu(packages, toolkit[0] if toolkit else None, table)
    yield from _vllm(host, packages, kind, table)


def _python(host: Host, kind: str, table: matrix.Matrix) -> Iterator[Finding]:
    version = host.python_version
    low, high = table.python["min"], table.python["max"]
    minor = matrix.key(version)[:2]
    if minor < matrix.key(low)[:2]:
        yield Finding.fail("python", f"Python {version}: {low} or newer is required", f"use Python {high}")
    elif minor > matrix.key(high)[:2] and kind == "npu":
        text = f"Python {version} is too new for vllm-ascend ({low} to {high})"
        yield Finding.warn("python", text, f"use Python {high}", {"matrix": table.date})
    else:
        yield Finding.ok("python", f"Python {version}")


def _torch(packages: Mapping[str, str], detail: Mapping[str, str], kind: str) -> Iterator[Finding]:
    version = packages.get("torch")
    if version and kind == "cuda" and version.endswith("+cpu"):
        text = f"torch {version} is built without CUDA: everything would run on the CPU"
        yield Finding.fail("torch", text, f"pip install torch=={version.split('+')[0]} from the CUDA index", detail)
        return
    if version:
        yield Finding.ok("torch", f"torch {version}", detail)
        return
    line = install_line("npu") if kind == "npu" else install_line("local")
    yield Finding.warn("torch", "torch is not installed: no local model can run", line, detail)


def _transformers(packages: Mapping[str, str], table: matrix.Matrix) -> Iterator[Finding]:
    version = packages.get("transformers")
    low = table.transformers["min"]
    if version is None:
        yield Finding.warn(
            "transformers", "transformers is not installed: no local model can run", install_line("local")
        )
    elif matrix.key(version) < matrix.key(low):
        yield Finding.fail(
            "transformers",
            f"transformers {version} does not support Qwen3-VL ({low} or newer does)",
            f"pip install 'transformers>={low},<{table.transformers['max']}'",
        )
    else:
        yield Finding.ok("transformers", f"transformers {version} supports Qwen3-VL")


def _torch_npu(packages: Mapping[str, str], cann: str | None, table: matrix.Matrix) -> Iterator[Finding]:
    npu, torch = packages.get("torch-npu"), packages.get("torch")
    if npu is None:
        yield Finding.fail(
            "torch-npu",
            "torch_npu is not installed: everything would run on the CPU",
            f"pip install torch-npu=={torch.split('+')[0]}" if torch else install_line("npu"),
        )
        return
    if torch and matrix.release(npu) != matrix.release(torch):
        built_for = npu.split(".post")[0].split("rc")[0]
        yield Finding.fail(
            "torch-npu",
            f"torch_npu {npu} needs torch {built_for}, but torch {torch} is installed",
            f"pip install torch=={built_for}",
            {"matrix": table.date},
        )
        return
    known = next((item for item in table.cann_for_torch_npu if matrix.same(item, npu)), None)
    if known is None or cann is None:
        reason = "CANN was not found" if cann is None else f"not in the matrix of {table.date}"
        yield Finding.ok("torch-npu", f"torch_npu {npu}; its CANN was not compared: {reason}")
        return
    fitting_cann = table.cann_for_torch_npu[known]
    if fitting_cann is None:
        text = f"torch_npu {npu}; its CANN is not known to the matrix of {table.date}"
        yield Finding.ok("torch-npu", text, {"matrix": table.date})
        return
    if matrix.same(fitting_cann, cann):
        yield Finding.ok("torch-npu", f"torch_npu {npu} with CANN {cann}", {"matrix": table.date})
        return
    fitting = [item for item, version in table.cann_for_torch_npu.items() if version and matrix.same(version, cann)]
    same_torch = [item for item in fitting if matrix.release(item) == matrix.release(npu)]
    line = f"pip install torch-npu=={same_torch[0]}" if same_torch else f"install CANN {fitting_cann}"
    # A patch release of CANN keeps what its minor release promised; another minor release does not.
    near = matrix.key(fitting_cann)[:2] == matrix.key(cann)[:2]
    yield Finding(
        "torch-npu",
        "warn" if near else "fail",
        f"torch_npu {npu} needs CANN {fitting_cann}, but CANN {cann} is installed",
        {"matrix": table.date, "for_this_cann": fitting},
        line,
    )


def _vllm(host: Host, packages: Mapping[str, str], kind: str, table: matrix.Matrix) -> Iterator[Finding]:
    vllm, plugin = packages.get("vllm"), packages.get("vllm-ascend")
    if vllm and kind == "npu" and plugin is None:
        yield Finding.fail(
            "vllm-ascend",
            f"vllm {vllm} is installed without vllm-ascend: it will not use the NPU",
            f"pip install vllm-ascend=={vllm.split('+')[0]}",
        )
    if plugin is None:
        return
    known = table.release(plugin)
    if matrix.untagged(plugin):
        text = f"vllm-ascend {plugin} is built from a source tree without tags: its release is not known, nor compared"
        yield Finding.skip("vllm-ascend", text)
        return
    if known is None:
        if vllm and matrix.release(vllm) != matrix.release(plugin):
            base = ".".join(map(str, matrix.release(plugin)))
            yield Finding.fail(
                "vllm-ascend",
                f"vllm-ascend {plugin} is incompatible with vllm {vllm}: it is built for vllm {base}",
                f"use the vllm-ascend image v{plugin}, which holds the whole set, or pip install vllm=={base}",
                {"matrix": table.date},
            )
        else:
            text = f"vllm-ascend {plugin} is not in the matrix of {table.date}; its CANN was not compared"
            yield Finding.ok("vllm-ascend", text)
        return
    row = table.vllm_ascend[known]
    toolkit = cann_version(host)
    pairs = (
        ("vllm", vllm, row.get("vllm")),
        ("torch", packages.get("torch"), row.get("torch")),
        ("cann", toolkit[0] if toolkit else None, row.get("cann")),
        ("triton-ascend", packages.get("triton-ascend"), row.get("triton_ascend")),
    )
    wrong = [
        f"{name} {version} (wants {fitting})"
        for name, version, fitting in pairs
        if version and fitting and matrix.release(version) != matrix.release(fitting)
    ]
    if wrong:
        yield Finding.fail(
            "vllm-ascend",
            f"vllm-ascend {plugin} is incompatible with {', '.join(wrong)}",
            f"use the vllm-ascend image v{known}, which holds the whole set",
            {"matrix": table.date, "row": row},
        )
    else:
        unknown = [name for name, version, fitting in pairs if version and fitting is None]
        text = f"vllm-ascend {plugin} with vllm {vllm}"
        if unknown:
            text += f"; its {' and '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not known to the matrix"
        yield Finding.ok("vllm-ascend", text, {"matrix": table.date, "row": row})


def _set_env(host: Host, folder: str) -> str:
    parent = folder.rsplit("/", 1)[0]
    scripts = (script for script in (f"{folder}/set_env.sh", f"{parent}/set_env.sh") if host.path(script).exists())
    return next(scripts, "/usr/local/Ascend/ascend-toolkit/set_env.sh")
