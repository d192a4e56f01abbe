"""The LoRA adapters of a backend: read and refused before the model is loaded, then attached to it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qvl.backends.local.model.adapter_files import AdapterFiles, adapter_folder, named_adapters, read_adapter
from qvl.backends.local.text.processor import AdapterPlace
from qvl.errors import QvlError
from qvl.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvl.backends.local.model.linear import LinearPlan

log = logger(__name__)


class Adapters:
    """The adapters by name; "" is the name of the one with which every request is answered.

    Args:
        adapter: as of `LocalBackend`.

    Raises:
        ConfigError: it is neither a path nor a mapping of names to paths.
    """

    def __init__(self, adapter: object) -> None:
        self.paths = named_adapters(adapter)
        self.files: dict[str, AdapterFiles] = {}

    def refuse_missing(self) -> None:
        """Raise ConfigError for one in a folder that is absent, incomplete, or would be half applied."""
        for name, path in self.paths.items():
            if adapter_folder(path) is not None:
                read_adapter(name, path)

    def read(self, model: str | None) -> None:
        """Read them all, without their weights; those at a hub are downloaded. `model` is what they are for.

        Raises:
            ConfigError: as of `read_adapter`, or it was trained on another model by its name.
        """
        for name, path in self.paths.items():
            if name not in self.files:
                self.files[name] = read_adapter(name, path)
            self.files[name].refuse_base(model)

    def peek(self) -> bool:
        """Read those that are in folders; return False if some are not, or cannot be read."""
        try:
            for name, path in self.paths.items():
                if name not in self.files:
                    if adapter_folder(path) is None:
                        return False
                    self.files[name] = read_adapter(name, path)
        except (QvlError, OSError):
            return False
        return True

    def digests(self) -> Mapping[str, str]:
        """Return what identifies each one that was read."""
        if len(self.files) < len(self.paths):
            self.peek()
        return {name: files.digest for name, files in self.files.items()}

    def named(self) -> dict[str, str]:
        """Return the digests of those that a request may name; "" of one at a hub that is not read yet."""
        digests = self.digests()
        return {name: digests.get(name, "") for name in self.paths if name}

    def places(self) -> dict[str, AdapterPlace]:
        """Return the number of each, from 1 on."""
        return {
            name: AdapterPlace(number, shows=bool(files.shows))
            for number, (name, files) in enumerate(self.files.items(), 1)
        }

    def attach(self, model: PreTrainedModel, plan: LinearPlan) -> None:
        """Attach them to the products of `plan`.

        Raises:
            ConfigError: one was trained on another model, or would be half applied.
        """
        if not self.files:
            return
        from qvl.backends.local.model.adapters import attach

        for number, (name, files) in enumerate(self.files.items(), 1):
            attach(files, number, model, plan)
            log.info("adapter_ready", adapter=name or files.title, modules=len(files.targets), rank=files.rank)
