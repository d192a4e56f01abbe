"""The command `qvl`. Each subcommand is a module of this package, imported only when it is called.

A command module has a function of the command's name or, for a group or a command with settings of its own,
`register(app)`, which adds it to a `typer.Typer`. A module of `COMMANDS` that cannot be imported fails alone, with one
line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from qvl.cli.terminal import open_streams

if TYPE_CHECKING:
    from typer._click.core import Command, Context
    from typer._click.exceptions import UsageError
    from typer._click.formatting import HelpFormatter
else:
    # Its place differs between the versions of typer, which carries click within it or beside it.
    UsageError = typer.BadParameter.__base__

COMMANDS: Final = {
    "analyze": "Product pictures in, typed analyses out.",
    "ask": "Ask a question about one or several pictures.",
    "chat": "Talk with the model, with pictures at any turn.",
    "locate": "Where on a picture something is: boxes or points.",
    "read": "The text of a document, page by page: Markdown or HTML.",
    "export": "Boxes of results as COCO, YOLO or Label Studio.",
    "decide": "How probable each possible answer to a question is.",
    "calibrate": "How often answers are right, by labelled pictures.",
    "eval": "How often answers are right, and against another model.",
    "parity": "Where the answers of two deployments part, and why.",
    "batch": "Answer a file of requests, line by line.",
    "cache": "Look into the cache of answers, or clear it.",
    "models": "The bundled model, those on this machine, and published ones.",
    "plugins": "Backends and caches, and the plugins they come from.",
    "serve": "Serve an OpenAI-compatible API.",
    "endpoints": "Examine a pool of OpenAI-compatible endpoints.",
    "bench": "Load an endpoint and measure it.",
    "tune": "Measure settings of a server on this host; keep the best.",
    "agent": "Analyze products and search a catalogue.",
    "mcp": "Offer qvl's tools over the Model Context Protocol.",
    "doctor": "Find out what is wrong with this host.",
    "launch": "Run one engine in a container on an Ascend host.",
    "version": "The versions of qvl and of what it runs on.",
}
EPILOG: Final = "Exit codes: 0 done, 1 some failed, 2 wrong use. `qvl COMMAND --help` says more."


class LazyGroup(TyperGroup):
    """A group that lists commands by name and help line, and imports one only when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._listing = False
        for command, line in COMMANDS.items():
            if find_spec(f"{__name__}.{command}") is not None:
                self.commands[command] = TyperCommand(command, help=line)

    def list_commands(self, ctx: Context | None) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        if self._listing or cmd_name not in self.commands:
            return super().get_command(ctx, cmd_name)
        return load_command(cmd_name)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context | None = None, **extra: object
    ) -> Context:
        with one_line_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Context) -> object:
        with one_line_errors():
            return super().invoke(ctx)


class SingleCommand(TyperCommand):
    """A command that is also a program of its own, such as `qvl-serve`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context | None = None, **extra: object
    ) -> Context:
        with one_line_errors():
            return super().make_context(info_name, args, parent, **extra)


def load_command(name: str) -> Command:
    """Import the module `qvl.cli.<name>` and return its command.

    Raises:
        ConfigError: its module cannot be imported.
    """
    from importlib import import_module

    from qvl.errors import ConfigError, QvlError

    part = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    try:
        module = import_module(f"{__name__}.{name}")
        register = getattr(module, "register", None) or (lambda app: app.command(name)(getattr(module, name)))
        register(part)
    except QvlError:
        raise
    except Exception as exc:
        raise ConfigError(
            f"the command {name!r} cannot be loaded: {type(exc).__name__}: {exc}",
            hint="the other commands work; install qvl again",
        ) from exc
    command = typer.main.get_command(part)
    return command.commands.get(name, command) if isinstance(command, TyperGroup) else command


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an exception in the context as one line on stderr, and exit with its code.

    A closed pipe exits silently with 141 and Ctrl-C with 130, as shells expect.
    """
    from qvl.errors import QvlError

    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except QvlError as exc:
        from qvl.cli.failure import exit_code, report

        report(exc)
        raise typer.Exit(exit_code(exc)) from exc
    except UsageError as exc:
        message = _with_variables(exc)
        if message:  # else it is the help of a group that was called alone
            from qvl.cli.failure import report
            from qvl.errors import ConfigError

            command = exc.ctx.command_path if exc.ctx is not None else "qvl"
            report(ConfigError(message.rstrip("."), hint=f"{command} --help"))
        raise typer.Exit(2) from exc
    except BrokenPipeError:
        from qvl.cli.failure import abandon_stdout

        abandon_stdout()
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except OSError as exc:
        # Everything else that is read or written has been told apart before.
        from qvl.cli.failure import FAILED, abandon_stdout, report
        from qvl.errors import write_failed

        report(write_failed("the output", exc))
        abandon_stdout()
        raise typer.Exit(FAILED) from exc


def _with_variables(error: UsageError) -> str:
    """Return the message of `error`, with several variables of an option named one by one, not as a Python list."""
    message: str = error.format_message()
    names = getattr(getattr(error, "param", None), "envvar", None)
    if isinstance(names, list):
        message = message.replace(f"'{names}'", ", ".join(map(repr, names)))
    return message


def _version(shown: bool) -> None:
    if shown:
        from qvl._version import __version__

        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


@app.callback()
def _qvl(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Qwen3-VL on whatever you have: Ascend NPU, GPU, laptop, vLLM or any OpenAI-compatible endpoint."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `qvl` with `args` (None: sys.argv) and exit the process with its exit code."""
    open_streams()
    app(args=args, prog_name="qvl")
