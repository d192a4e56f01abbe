"""`qvl plugins`: the available backends and caches, and the plugins that provide them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

from qvl.cli import options
from qvl.cli.terminal import print_json

if TYPE_CHECKING:
    from qvl.plugins.host import PluginHost


class PluginRow(TypedDict):
    """One plugin and the names that it provides."""

    plugin: str
    version: str
    backends: list[str]
    caches: list[str]
    hooks: list[str]


def plugins(as_json: options.JsonOnly = False) -> None:
    """List built-in and installed plugins, and those that failed to load, with the reason."""
    import logging

    from qvl.plugins.host import PluginHost

    # The table says what failed; a warning beside it would say it twice.
    logging.getLogger("qvl.plugins").setLevel(logging.ERROR)
    host = PluginHost()
    rows = [_row(host, name) for name in host.names()]
    if as_json:
        print_json({"plugins": rows, "failures": [asdict(failure) for failure in host.failures]})
        return
    from rich.table import Table
    from rich.text import Text

    from qvl.cli.console import stdout

    table = Table()
    for column in ("plugin", "version", "backends", "caches", "other hooks"):
        table.add_column(column, overflow="fold")
    for row in rows:
        names = (", ".join(kind) for kind in (row["backends"], row["caches"], row["hooks"]))
        table.add_row(*(Text(cell) for cell in (row["plugin"], row["version"], *names)))
    for failure in host.failures:
        table.add_row(Text(failure.name, style="red"), "", Text(f"left out: {failure.error}", style="red"), "", "")
    stdout().print(table)


def _row(host: PluginHost, name: str) -> PluginRow:
    provided = host.provides(name)
    return {
        "plugin": name,
        "version": _version(name),
        "backends": provided["backends"],
        "caches": provided["caches"],
        "hooks": [
            hook
            for hook in ("register_routes", "response_done")
            if any(impl.plugin_name == name for impl in getattr(host.hook, hook).get_hookimpls())
        ],
    }


def _version(plugin: str) -> str:
    """Return the version of the plugin's package; "" if it is not from a package."""
    from importlib.metadata import entry_points

    from qvl._version import __version__
    from qvl.plugins.host import GROUP

    if plugin == "qvl":
        return __version__
    for point in entry_points(group=GROUP):
        if point.name == plugin and point.dist is not None:
            return point.dist.version
    return ""
