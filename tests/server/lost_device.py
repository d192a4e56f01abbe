"""A plugin for a real `qvl-serve`: the bundled model, on a device that is lost once a certain file is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvl.backends.local.backend import LocalBackend
from qvl.plugins.hookspecs import hookimpl

SIGN = "LOST_DEVICE_SIGN"


class LostDevice(LocalBackend):
    """Computes as ever until the file named by the environment appears."""

    def __init__(self, model: str | None = None) -> None:
        super().__init__(None)

    async def open(self) -> None:
        await super().open()
        assert self._loaded is not None
        runner = self._loaded.engine.runner
        compute = runner.forward

        def forward(*args: Any, **options: Any) -> Any:
            if Path(os.environ[SIGN]).exists():
                raise RuntimeError("the device is lost")
            return compute(*args, **options)

        runner.forward = forward  # type: ignore[method-assign]


@hookimpl
def register_backends(register: Callable[[str, Any], None]) -> None:
    register("lost", LostDevice)


def install(folder: Path) -> dict[str, str]:
    """Makes the plugin an installed one for processes with this environment; its sign is `folder`/sign."""
    told = folder / "lost_device-1.0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: lost-device\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(f"[qvl]\nlost = {__name__}\n")
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(root))), SIGN: str(folder / "sign")}
