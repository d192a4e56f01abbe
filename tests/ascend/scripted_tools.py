"""The programs of a made-up Ascend host, each of which fails where the real one would; qvl is the real one.

Run as `python -m tests.ascend.scripted_tools NAME ARGUMENTS`. A container that serves a model is a real qvl-serve with
the bundled model: it has its port, and npu-smi shows it on the NPUs that the container was given.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.ascend.scripted_cluster import helm, kubectl, ray
from tests.ascend.scripted_host import HERE, MADE_UP, PROJECT, ToolError, at, need, option, state

PULLED = {"redis:7.4-alpine", "prom/prometheus:v2.55.1", "grafana/grafana:11.3.1"}
RUN_SWITCHES = {"--detach", "--privileged", "--rm"}
RUN_VALUES = {
    "--name", "--restart", "--device", "--volume", "--env", "--shm-size", "--ulimit", "--publish", "--entrypoint",
    "--network", "--label",
}  # fmt: skip
CLUSTER = {"helm": helm, "kubectl": kubectl, "ray": ray}
SERVE = [sys.executable, "-m", "qvl.cli.serve"]


# --- docker


def docker(words: list[str]) -> None:
    command, rest = words[0], words[1:]
    known = {
        "pull": pull, "build": build, "tag": tag, "push": push, "images": images, "run": run, "exec": inside,
        "rm": remove, "ps": ps, "logs": logs, "inspect": inspect, "compose": compose,
    }  # fmt: skip
    need(command in known, f"docker: '{command}' is not a docker command")
    known[command](rest)


def has_registry(image: str) -> bool:
    return "." in image.partition("/")[0] and "/" in image


def pull(words: list[str]) -> None:
    need(has_registry(words[-1]), f"pull access denied for {words[-1]}, repository does not exist")
    with state() as kept:
        kept["images"].append(words[-1])


def build(words: list[str]) -> None:
    given = dict(value.split("=", 1) for value in option(words, "--build-arg"))
    (name,), (file,) = option(words, "-t"), option(words, "-f")
    context = Path(words[-1])
    need(Path(file).is_file(), f"failed to read dockerfile: open {file}: no such file or directory")
    text = Path(file).read_text()
    for source in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for one in source.split():
            need((context / one).exists(), f"failed to compute cache key: {one}: not found")
    declared = set(re.findall(r"^ARG (\w+)", text, re.M))
    need(
        given.keys() <= declared,
        f"[Warning] One or more build-args {sorted(given.keys() - declared)} were not consumed",
    )
    with state() as kept:
        if option(words, "--target") != ["pool"]:
            need(given.get("BASE") in kept["images"], f"{given.get('BASE')}: not found")
        kept["images"].append(name)


def tag(words: list[str]) -> None:
    with state() as kept:
        need(words[0] in kept["images"], f"No such image: {words[0]}")
        kept["images"].append(words[1])


def push(words: list[str]) -> None:
    with state() as kept:
        need(words[0] in kept["images"], f"An image does not exist locally with the tag: {words[0]}")
        need(has_registry(words[0]), "denied: requested access to the resource is denied")
        kept["pushed"].append(words[0])


def images(words: list[str]) -> None:
    (template,) = option(words, "--format")
    with state() as kept:
        for image in kept["images"]:
            repository, _, label = image.rpartition(":")
            line = template.replace("{{.Repository}}", repository).replace("{{.Tag}}", label)
            print(line.replace("{{.Digest}}", "<none>"))


def run(words: list[str]) -> None:
    given: dict[str, list[str]] = {}
    rest = list(words)
    while rest[0].startswith("-"):
        flag = rest.pop(0)
        need(flag in RUN_SWITCHES | RUN_VALUES, f"unknown flag: {flag}", 125)
        given.setdefault(flag, []).append(rest.pop(0) if flag in RUN_VALUES else "")
    image, arguments = rest[0], rest[1:]
    (name,) = given["--name"]
    environ = {"MADE_UP": str(MADE_UP), "MADE_UP_INSIDE": "1", "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    for entry in given.get("--env", []):
        key, set_here, value = entry.partition("=")
        if set_here or key in os.environ:
            environ[key] = value if set_here else os.environ[key]
    with state() as kept:
        need(image in kept["images"], f"Unable to find image '{image}' locally", 125)
        need(name not in kept["containers"], f'Conflict. The container name "/{name}" is already in use', 125)
        for node in given.get("--device", []):
            need(at(node.partition(":")[0]).exists(), f"error gathering device information: {node}: no such file", 125)
        for volume in given.get("--volume", []):
            source = volume.partition(":")[0]
            need(at(source).exists(), f"{source} is not there: docker would make an empty folder of it", 125)
        pid = start(arguments, environ, given.get("--publish", []))
        kept["containers"][name] = {
            "image": image, "pid": pid, "environ": environ, "ports": given.get("--publish", []),
            "npus": re.findall(r"/davinci(\d+)", " ".join(given.get("--device", []))),
        }  # fmt: skip
    print("0123456789abcdef")


def start(arguments: list[str], environ: dict[str, str], published: list[str]) -> int:
    """Starts what stands after `bash -c`; returns its process, 0 where there is none to look at."""
    if "qvl-serve" in arguments or "vllm" in arguments:
        label = option(arguments, "--served-model-name")[-1]
        if "qvl-serve" in arguments:
            parse_serve(arguments[arguments.index("qvl-serve") + 1 :])
        key = environ.get("QVL_API_KEY") or environ.get("VLLM_API_KEY")
        return serve(published[0].rsplit(":", 1)[0], label, key)
    flag, command = arguments
    need(flag == "-ic", f"bash: {flag}: what is run needs the image's environment", 125)
    done = subprocess.run(["bash", "-c", command], env=environ, check=False)
    need(done.returncode == 0, f"the container ended with {done.returncode}", 125)
    return 0


def parse_serve(words: list[str]) -> None:
    from qvl.cli import load_command

    try:
        load_command("serve").make_context("serve", list(words))
    except Exception as error:
        raise ToolError(f"the container ended: {error}", 125) from error


def serve(address: str, label: str, key: str | None) -> int:
    host, _, port = address.rpartition(":")
    words = [*SERVE, "--host", host.strip("[]"), "--port", port, "--served-model-name", label, "--cache", "off"]
    words += ["--api-key", key] if key else ["--allow-unauthenticated"]
    with (MADE_UP / f"serve-{port}.log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True).pid


def inside(words: list[str]) -> None:
    words = [word for word in words if word != "--detach"]
    name, command = words[0], words[1:]
    with state() as kept:
        need(name in kept["containers"], f"No such container: {name}")
        environ = kept["containers"][name]["environ"]
    # An interactive shell reads the image's .bashrc, which sets up CANN.
    if "-ic" in command:
        environ |= {
            "ASCEND_HOME_PATH": "/usr/local/Ascend/ascend-toolkit/latest",
            "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb",
        }
    command = [word.replace("-ic", "-c") if word == "-ic" else word for word in command]
    done = subprocess.run(command, env=environ, check=False)
    need(done.returncode == 0, f"exit code {done.returncode}", done.returncode)


def remove(words: list[str]) -> None:
    with state() as kept:
        for name in words:
            if name != "-f":
                need(name in kept["containers"], f"No such container: {name}")
                end(kept["containers"].pop(name)["pid"])


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGKILL)


def ps(words: list[str]) -> None:
    with state() as kept:
        for name, one in kept["containers"].items():
            print(name, *one["ports"])


def logs(words: list[str]) -> None:
    for path in MADE_UP.glob("serve-*.log"):
        print(path.read_text()[-2000:])


def inspect(words: list[str]) -> None:
    with state() as kept:
        need(words[-1] in kept["containers"], f"No such object: {words[-1]}")
        pid = kept["containers"][words[-1]]["pid"]
    alive = not pid or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    print("running 0" if alive else "exited 1")


def compose(words: list[str]) -> None:
    (file,) = option(words, "-f")
    need(Path(file).is_file(), f"open {file}: no such file or directory")
    text = Path(file).read_text()
    for name in re.findall(r"\$\{(\w+):\?", text):
        need(os.environ.get(name), f"required variable {name} is missing a value")
    services = yaml.safe_load(text)["services"]
    command = words[words.index(file) + 1]
    with state() as kept:
        if command == "up":
            for name, service in services.items():
                need(service["image"] in {*kept["images"], *PULLED}, f"{name}: pull access denied")
                for volume in service.get("volumes", []):
                    source = volume.partition(":")[0]
                    there = Path(file).parent / source if source.startswith(".") else at(source)
                    need(not source.startswith((".", "/")) or there.exists(), f"{name}: {source} is not there")
            pool = services["pool"]
            label = option(pool["command"], "--served-model-name")[0]
            pid = serve(pool["ports"][0].rsplit(":", 1)[0], label, os.environ["QVL_API_KEY"])
            given = " ".join(node for service in services.values() for node in service.get("devices", []))
            npus = re.findall(r"/davinci(\d+)", given)
            kept["containers"]["qvl-pool-1"] = {
                "image": pool["image"], "pid": pid, "environ": {}, "ports": [], "npus": npus,
            }  # fmt: skip
            wait_ready("http://127.0.0.1:8000/ready")
        elif command == "down":
            end(kept["containers"].pop("qvl-pool-1")["pid"])
        else:
            need(command == "ps", f"unknown docker command: compose {command}")
            print(*services)


def wait_ready(url: str) -> None:
    import time

    import httpx

    for _ in range(240):
        with contextlib.suppress(httpx.HTTPError):
            headers = {"Authorization": f"Bearer {os.environ['QVL_API_KEY']}"}
            if httpx.get(url, headers=headers, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise ToolError(f"{url} is not ready")


# --- what a fresh host gets from elsewhere


def git(words: list[str]) -> None:
    need(words[0] == "clone" and len(words) == 3, f"git: {words}")
    need((Path(words[1]) / "pyproject.toml").is_file(), f"fatal: repository '{words[1]}' does not exist", 128)
    Path(words[2]).mkdir()
    for entry in Path(words[1]).iterdir():
        (Path(words[2]) / entry.name).symlink_to(entry)


def python3(words: list[str]) -> None:
    need(words[:2] == ["-m", "venv"], f"python3: {words}")
    (Path(words[2]) / "bin").mkdir(parents=True)
    (Path(words[2]) / "bin/activate").touch()


def pip(words: list[str]) -> None:
    need(words[0] == "install", f'ERROR: unknown command "{words[0]}"')
    for what in words[1:]:
        if what.startswith("."):
            need(Path("pyproject.toml").is_file(), f"ERROR: '{what}' is not installable: no pyproject.toml")
        with state() as kept:
            kept["pip"].append("qvl" if what.startswith(".") else what)


def download(package: str, repository: str, folder: list[str]) -> None:
    with state() as kept:
        need(package in kept["pip"], "command not found", 127)
    need(repository.count("/") == 1 and len(folder) == 1, f"{repository}: a repository and a folder are needed")
    weights = PROJECT / "src/qvl/tiny/weights"
    shutil.copytree(weights, folder[0], dirs_exist_ok=True)


def hf(words: list[str]) -> None:
    need(words[0] == "download", f"hf: {words[0]}")
    download("huggingface_hub", words[1], option(words, "--local-dir"))


def modelscope(words: list[str]) -> None:
    need(words[0] == "download", f"modelscope: {words[0]}")
    download("modelscope", *option(words, "--model"), option(words, "--local_dir"))


# --- the driver


def npu_smi(words: list[str]) -> None:
    need(words == ["info"], f"npu-smi: {words}")
    name = "26.0.rc2-910B3-in-container.txt" if os.environ.get("MADE_UP_INSIDE") else "24.1.rc3-910B4.txt"
    text = (HERE / "recordings" / name).read_text()
    if os.environ.get("MADE_UP_INSIDE"):
        # A container has one of its two NPUs.
        text = re.sub(r"^\| 1     910B3.*\n.*\n.*\n", "", text, flags=re.M)
        text = re.sub(r"^\| 1       0 .*\n.*\n", "", text, flags=re.M)
    else:
        text = with_processes(text)
    print(text)


def with_processes(text: str) -> str:
    """What npu-smi prints where containers serve on NPUs."""
    with state() as kept:
        serving = [one for one in kept["containers"].values() if one["pid"]]
    for one in serving:
        for number in one["npus"]:
            row = f"| {number}       0                 | {one['pid']:<14}| python3{' ' * 18}| 30000{' ' * 19}|"
            text = re.sub(rf"^\| No running processes found in NPU {number} .*$", row, text, flags=re.M)
    return text


def sudo(words: list[str]) -> None:
    need(words[:2] == ["usermod", "-aG"] and set(words[2].split(",")) == {"HwHiAiUser", "docker"}, f"sudo: {words}")


# --- qvl itself, on this host


def qvl(words: list[str]) -> None:
    from qvl.ascend import host as real
    from qvl.cli import main
    from tests.ascend.sized_host import SizedHost, matrix_of_today

    with state() as kept:
        within = bool(os.environ.get("MADE_UP_INSIDE"))
        need(within or "qvl" in kept["pip"], "qvl: command not found", 127)
    if "--ray-address" in words:
        # Ray is not here: the words are examined, and what would be replicas on every NPU is one server.
        parse_serve(words[1:])
        key = os.environ.get("QVL_API_KEY")
        need(key, "qvl: --host 0.0.0.0 wants a key: QVL_API_KEY")
        with state() as kept:
            kept["containers"]["ray"]["pid"] = serve("0.0.0.0:8000", "ray", key)
        return

    class MadeUpHost(SizedHost):
        """The made-up tree, and none of this machine's sizes; a path that is below it already stays."""

        def __init__(self) -> None:
            place = MADE_UP / "inside" if within else MADE_UP
            super().__init__(
                root=place / "root",
                interpreter=str(place / "bin/python-recorded"),
                site=(str(place / "site"),) if within else (),
                python_version="3.11.9",
            )

        def path(self, absolute: str | Path) -> Path:
            inner = Path(absolute)
            return inner if inner.is_relative_to(MADE_UP) else super().path(absolute)

    real.Host = MadeUpHost  # type: ignore[misc]
    sys.argv = ["qvl", *words]
    with matrix_of_today():
        main()


def main() -> None:
    name, words = sys.argv[1].replace("npu-smi", "npu_smi"), sys.argv[2:]
    try:
        (CLUSTER.get(name) or globals()[name])(words)
    except ToolError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.code) from error


if __name__ == "__main__":
    main()
