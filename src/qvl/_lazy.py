"""Lazy imports: a package's names are imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy(package: str, homes: Mapping[str, Sequence[str]], *, extra: str | None = None) -> Callable[[str], object]:
    """Return a `__getattr__` for `package` that imports each name from its module.

    Args:
        homes: names by module; a module that begins with a dot is within the package.
        extra: the extra to install if an import fails, for the error's hint.
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(module_of[name], package), name)
        except ModuleNotFoundError as exc:
            if extra is None:
                raise
            from qvl.errors import MissingDependencyError
            from qvl.suggest import install_line

            raise MissingDependencyError(f"{name} needs the package {exc.name!r}", hint=install_line(extra)) from exc
        vars(import_module(package))[name] = value
        return value

    return find
