"""Commands whose options are dataclass fields, so that an option is declared once and passed on with its dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import get_args, get_type_hints

from typer.models import ParameterInfo


class Without:
    """The fields that get no option and keep their defaults: `Annotated[Settings, Without("field")]`."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with a signature for typer, in which each dataclass parameter is one option per field."""
    parameters: list[Parameter] = []
    groups: dict[str, tuple[Callable[..., object], list[str]]] = {}
    for parameter in signature(command, eval_str=True).parameters.values():
        settings, *extra = get_args(parameter.annotation) or [parameter.annotation]
        if not (isinstance(settings, type) and is_dataclass(settings)):
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        omitted = extra[0].names if extra else ()
        options = [option for option in options_of(settings) if option.name not in omitted]
        groups[parameter.name] = (settings, [option.name for option in options])
        parameters += options

    @wraps(command)
    def expanded(**values: object) -> None:
        for name, (settings, names) in groups.items():
            values[name] = settings(**{field: values.pop(field) for field in names})
        command(**values)

    # Neither stands in the way of typer, which reads both.
    expanded.__annotations__ = {}
    expanded.__dict__["__signature__"] = Signature(parameters)
    return expanded


def options_of(settings: type) -> list[Parameter]:
    """Return a keyword parameter for each field of the dataclass `settings` that is annotated as an option.

    If `settings` has an ENV_PREFIX, the variable ENV_PREFIX + NAME sets the option too and wins over the option's own
    `envvar`; an option with `envvar=[]` has no variable.
    """
    hints = get_type_hints(settings, include_extras=True)
    prefix = getattr(settings, "ENV_PREFIX", "")
    options = []
    for field in fields(settings):
        infos = [part for part in get_args(hints[field.name]) if isinstance(part, ParameterInfo)]
        for info in infos:
            if prefix:
                names = [prefix + field.name.upper(), *(info.envvar or ())]
                # A list of one would stand as a list in typer's message about a value that cannot be read.
                info.envvar = None if info.envvar == [] else names if len(names) > 1 else names[0]
        if infos:
            default = Parameter.empty if field.default is MISSING else field.default
            annotation = hints[field.name]
            options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return options
