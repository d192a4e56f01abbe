"""Parsers of command line arguments: pictures and globs, NAME=VALUE pairs, durations, `module:Class`."""

from __future__ import annotations

import glob
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.pipeline.parse_parts import PictureLike
    from qvl.types import JsonObject

    Pictures: TypeAlias = PictureLike | Sequence[PictureLike]

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d|w)?")
_EXAMPLES: Final = {
    "--param": "temperature=0.2",
    "--option": "max_retries=3",
    "--header": "X-Team=vision",
    "--video": "fps=2",
}
# Variables of chat templates that are named like parameters.
TEMPLATE_SWITCHES: Final = ("enable_thinking", "add_vision_id")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One picture or group of pictures for the pipeline, and its label in the output."""

    label: str
    source: Pictures


def pictures(arguments: Sequence[str], *, together: bool = False) -> list[WorkItem]:
    """Return an item per picture in `arguments` (paths, URLs, globs, `-` for stdin), or with `together` one for all.

    Raises:
        ConfigError: a glob that matches nothing, or stdin named twice.
    """
    if list(arguments).count("-") > 1:
        raise ConfigError("stdin (-) can be read only once", hint="give '-' once")
    single = [picture for argument in arguments for picture in _expand(argument)]
    if not together or len(single) < 2:
        return [WorkItem(label, source) for label, source in single]
    return [WorkItem(" + ".join(label for label, _ in single), [source for _, source in single])]


def refuse_missing(work: Sequence[WorkItem]) -> None:
    """Raise ConfigError for the first picture that is a path without a file, before any work is done for others."""
    from qvl.pipeline.parse_request import listed

    for source in (source for item in work for source in listed(item.source)):
        if not isinstance(source, str) or _URL.match(source):
            continue
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            raise ConfigError(f"{source} is a folder", hint=f"'{source.rstrip('/')}/*'")
        if not os.path.isfile(path) and not os.path.isfile(path.partition("#page")[0]):
            raise ConfigError(f"no picture {source}", hint=f"looked from {os.getcwd()}")


def is_picture(argument: str) -> bool:
    """True if `argument` is a picture and not a question: an existing file, a URL, `-` or a glob."""
    if argument == "-" or argument.startswith(("http://", "https://", "data:image/", "data:application/pdf")):
        return True
    argument = argument.partition("#page")[0] if not os.path.isfile(argument) else argument
    return os.path.isfile(os.path.expanduser(argument)) or (" " not in argument and bool(glob.glob(argument)))


def _expand(argument: str) -> list[tuple[str, PictureLike]]:
    """Return (label, picture) for each picture that `argument` names."""
    if argument == "-":
        from qvl.media.policy import DEFAULT_POLICY

        # One byte more than the gate lets pass, so that it is the gate that says so; a pipe may never end.
        return [("<stdin>", sys.stdin.buffer.read(DEFAULT_POLICY.max_bytes + 1))]
    if _URL.match(argument) or os.path.exists(argument) or not glob.has_magic(argument):
        label = argument if len(argument) <= 160 else f"{argument[:159]}…"
        return [(label, argument)]
    pattern, hash_sign, pages = argument.partition("#page")
    names = sorted(name for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name))
    if not names:
        raise ConfigError(f"no file matches {argument!r}", hint=f"looked from {os.getcwd()}")
    return [(name + hash_sign + pages,) * 2 for name in names]


def pairs(texts: Sequence[str], option: str) -> JsonObject:
    """Return `NAME=VALUE` texts as a dictionary, values parsed as JSON where possible; errors name `option`.

    Raises:
        ConfigError: a text without `=`.
    """
    values: JsonObject = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option} {text!r} is not NAME=VALUE", hint=f"write {option} {_EXAMPLES[option]}")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def of_template(params: JsonObject) -> JsonObject:
    """Return what `--param` says to the model's chat template, which is taken out of `params`.

    `chat_template_kwargs={"enable_thinking": false}`, or the commoner ones of these by themselves.

    Raises:
        ConfigError: it is said twice, or an invalid value.
    """
    from qvl.pipeline.parse_request import read_template_kwargs
    from qvl.types import EFFORTS

    names = ("chat_template_kwargs", "reasoning_effort")
    given: JsonObject = {name: params.pop(name) for name in names if name in params}
    switches = {name: params.pop(name) for name in TEMPLATE_SWITCHES if name in params}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"--param {name}={value} is neither true nor false", hint=f"{name}=false", param=name)
    if given.get("reasoning_effort") not in (None, *EFFORTS):
        what = f"--param reasoning_effort={given['reasoning_effort']} is unknown"
        raise ConfigError(what, hint=", ".join(EFFORTS), param="reasoning_effort")
    kwargs = read_template_kwargs(given.get("chat_template_kwargs"), {})
    if twice := next((name for name in switches if name in kwargs), None):
        raise ConfigError(f"--param {twice} is given twice", hint="in chat_template_kwargs too", param=twice)
    if kwargs or switches:
        given["chat_template_kwargs"] = {**kwargs, **switches}
    return given


def refuse_lora(model: str | None) -> None:
    """Check that the backend of `model` takes LoRA adapters.

    Raises:
        ConfigError: it does not.
    """
    backend, colon, _ = (model or "").partition(":")
    if not colon or backend not in ("openai", "replay", "openvino"):
        return
    served = "an endpoint's adapters are models of it: openai:NAME"
    hint = served if backend == "openai" else "take the model itself, or vllm:NAME"
    raise ConfigError(f"--lora is for a local model and vllm:NAME, not for {model}", hint=hint, param="lora")


def backend_options(texts: Sequence[str]) -> JsonObject:
    """Return the NAME=VALUE texts of `--option` as a dictionary.

    Raises:
        ConfigError: a text without `=`, or a name that is a pipeline argument.
    """
    from qvl.pipeline.async_pipeline import AsyncPipeline

    options = pairs(texts, "--option")
    for name in inspect.signature(AsyncPipeline).parameters:
        if name in options:
            raise ConfigError(f"--option {name} is not an option of the backend", hint="see --help for its option")
    return options


def duration(text: str) -> float:
    """Return the seconds in `text`: `90`, `90s`, `15m`, `36h`, `7d`, `2w`, or several together such as `1d12h`.

    Raises:
        ConfigError: `text` is not a duration.
    """
    compact = text.strip().lower().replace(" ", "")
    pieces = _DURATION.findall(compact)
    if not pieces or "".join(number + unit for number, unit in pieces) != compact:
        raise ConfigError(f"invalid duration {text!r}", hint="write 90s, 15m, 36h, 7d or 2w")
    return sum(float(number) * _SECONDS[unit or "s"] for number, unit in pieces)


def schema(text: str) -> SchemaLike:
    """Return the schema that `text` names: the JSON schema `bill.json`, or the type `module:Class` or `file.py:Class`.

    Modules in the current folder are found too.

    Raises:
        ConfigError: the schema is not found or is unsupported.
    """
    from qvl.analysis.schema_types import schema_type

    schema_like: SchemaLike = _json_schema(text) if text.endswith(".json") else _type_of(text)
    try:
        schema_type(schema_like)
    except ConfigError as exc:
        raise ConfigError(f"--schema {text}: {exc.message}", hint=exc.hint, param="schema") from exc
    return schema_like


def _json_schema(path: str) -> JsonObject:
    try:
        read = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"--schema {path} cannot be read: {exc.strerror}", hint="check the path") from exc
    except ValueError as exc:
        raise ConfigError(f"--schema {path} is not JSON: {exc}", param="schema") from exc
    if not isinstance(read, dict):
        raise ConfigError(f"--schema {path} is not a JSON schema", hint='{"type": "object", "properties": {…}}')
    return read


def _type_of(text: str) -> SchemaLike:
    module, colon, path = text.rpartition(":")
    if not colon or not module or not path:
        raise ConfigError(
            f"--schema {text!r} names no schema",
            hint="write module:Class, file.py:Class or schema.json",
            param="schema",
        )
    folder = os.getcwd()
    if module.endswith(".py"):
        file = os.path.abspath(os.path.expanduser(module))
        if not os.path.isfile(file):
            raise ConfigError(f"no file {module!r} for --schema", hint="check the path", param="schema")
        # Its own folder comes first, so that it finds the modules beside it.
        folder, module = os.path.dirname(file), os.path.basename(file).removesuffix(".py")
        loaded_from = getattr(sys.modules.get(module), "__file__", None)
        if module in sys.modules and loaded_from != file:
            raise ConfigError(
                f"--schema: another module is called {module!r} already", hint="rename the file", param="schema"
            )
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        named: SchemaLike = attrgetter(path)(import_module(module))
    except AttributeError as exc:
        raise ConfigError(f"module {module!r} has no {path!r}", hint="check the spelling", param="schema") from exc
    except (Exception, SystemExit) as exc:
        raise ConfigError(
            f"module {module!r} of --schema cannot be imported: {type(exc).__name__}: {exc}",
            hint="run from its folder, or install it",
            param="schema",
        ) from exc
    return named
