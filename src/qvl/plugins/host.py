"""The plugin host: registers backends and caches of built-ins and installed packages by name.

Each Pipeline owns a host, so two pipelines in one process do not share what a test or a program registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeAlias

import pluggy

from qvl.errors import MissingDependencyError, PluginError, QvlError, UnknownNameError
from qvl.log import logger
from qvl.plugins import hookspecs
from qvl.plugins.hookspecs import hookimpl
from qvl.plugins.names import refuse_unknown_options
from qvl.suggest import install_line, nearest

Factory: TypeAlias = Callable[..., object] | str
GROUP: Final = "qvl"
EXTRAS: Final = {
    "fastapi": "server",
    "llguidance": "local",
    "openai": "openai",
    "openvino_genai": "openvino",
    "ray": "ray",
    "redis": "redis",
    "torch": "local",
    "transformers": "local",
    "uvicorn": "server",
    "vllm": "vllm",
}
log = logger("qvl.plugins")


class BuiltIns:
    """The backends, caches and map engines that ship with qvl, registered through the hooks of any plugin."""

    @hookimpl
    def register_backends(self, register: Callable[[str, Factory], None]) -> None:
        register("local", "qvl.backends.local.backend:LocalBackend")
        register("openai", "qvl.backends.openai.backend:OpenAIBackend")
        register("vllm", "qvl.backends.vllm.backend:VllmBackend")
        register("openvino", "qvl.backends.openvino.backend:OpenVinoBackend")
        register("ray", "qvl.backends.ray.backend:RayBackend")
        register("replay", "qvl.backends.replay:ReplayBackend")

    @hookimpl
    def register_caches(self, register: Callable[[str, Factory], None]) -> None:
        register("memory", "qvl.caches.memory:MemoryCache.from_url")
        register("sqlite", "qvl.caches.sqlite:SqliteCache.from_url")
        for scheme in ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster"):
            register(scheme, "qvl.caches.redis:open_redis")

    @hookimpl
    def register_map_engines(self, register: Callable[[str, Factory], None]) -> None:
        register("ray", "qvl.pipeline.ray_map:map_under_ray")


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """A plugin that failed to load, with the reason."""

    name: str
    error: str


@dataclass(slots=True)
class Registry:
    """Factories of one kind ("backend", "cache") by name."""

    kind: str
    factories: dict[str, Factory] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    def register_for(self, owner: str) -> Callable[[str, Factory], None]:
        def register(name: str, factory: Factory) -> None:
            if not isinstance(name, str) or not name or ":" in name:
                raise PluginError(f"{owner}: invalid {self.kind} name {name!r}", hint="letters, digits, + and -")
            if name in self.factories:
                holder = self.owners[name]
                raise PluginError(f"{owner}: the {self.kind} {name!r} is registered by {holder}", hint="take another")
            self.factories[name] = factory
            self.owners[name] = owner

        return register

    def build(self, name: str, /, *args: object, **options: object) -> Any:
        """Return what the factory of `name` makes of the arguments.

        Raises:
            UnknownNameError: no factory is registered under `name`; the nearest known name is suggested.
            ConfigError: an option that the factory does not take.
            MissingDependencyError: its package is not installed.
        """
        if name not in self.factories:
            raise UnknownNameError(f"unknown {self.kind} {name!r}", hint=nearest(name, self.factories))
        factory = resolve(self.factories[name], f"{self.kind} {name!r}")
        refuse_unknown_options(f"{self.kind} {name!r}", factory, options)
        return factory(*args, **options)


class PluginHost:
    """Loads built-ins, installed plugins and `extra` ones; a broken plugin is logged, listed in `failures`, skipped."""

    def __init__(self, extra: Iterable[object] = (), *, installed: Iterable[EntryPoint] | None = None) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self.backends = Registry("backend")
        self.caches = Registry("cache")
        self.map_engines = Registry("map engine")
        self.failures: list[PluginFailure] = []
        self._add("qvl", BuiltIns())
        for point in entry_points(group=GROUP) if installed is None else installed:
            self._load(point)
        for plugin in extra:
            self._add(getattr(plugin, "__name__", type(plugin).__name__), plugin)

    @property
    def hook(self) -> pluggy.HookRelay:
        return self._manager.hook

    def names(self) -> list[str]:
        """Return the names of the loaded plugins, in loading order."""
        return [name for name, plugin in self._manager.list_name_plugin() if plugin is not None]

    def provides(self, plugin: str) -> Mapping[str, list[str]]:
        """Return the names that a plugin registered, under "backends" and "caches"."""
        return {
            "backends": [name for name, owner in self.backends.owners.items() if owner == plugin],
            "caches": [name for name, owner in self.caches.owners.items() if owner == plugin],
        }

    def _load(self, point: EntryPoint) -> None:
        try:
            plugin = point.load()
        except Exception as exc:  # noqa: BLE001 - an outsider's import may raise anything, and must not end us
            self._fail(point.name, f"import failed: {type(exc).__name__}: {exc}")
            return
        self._add(point.name, plugin)

    def _add(self, name: str, plugin: object) -> None:
        hooks = self._manager.hook
        registering = (
            (self.backends, hooks.register_backends),
            (self.caches, hooks.register_caches),
            (self.map_engines, hooks.register_map_engines),
        )
        before = [(registry, dict(registry.factories), dict(registry.owners)) for registry, _ in registering]
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            for registry, hook in registering:
                for impl in hook.get_hookimpls():
                    if impl.plugin_name == name:
                        impl.function(registry.register_for(name))
        except Exception as exc:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            for registry, factories, owners in before:
                registry.factories, registry.owners = factories, owners
            if name == "qvl":
                raise
            self._fail(name, str(exc))

    def _fail(self, name: str, error: str) -> None:
        self.failures.append(PluginFailure(name, error))
        log.warning("plugin skipped", plugin=name, error=error)


def resolve(factory: Factory, what: str) -> Callable[..., object]:
    """Return the callable at "package.module:attribute.path", imported now.

    Raises:
        MissingDependencyError: the module's package is not installed.
        PluginError: the module or the attribute does not exist.
    """
    if not isinstance(factory, str):
        return factory
    module_name, _, path = factory.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in path.split("."):
            target = getattr(target, part)
    except QvlError:
        raise
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package == "qvl":
            raise PluginError(f"{what}: {factory!r} does not exist") from exc
        hint = install_line(EXTRAS[package]) if package in EXTRAS else f"pip install {package}"
        raise MissingDependencyError(f"{what} needs the package {package!r}", hint=hint) from exc
    except AttributeError as exc:
        raise PluginError(f"{what}: {factory!r} does not exist") from exc
    return target  # type: ignore[no-any-return]
