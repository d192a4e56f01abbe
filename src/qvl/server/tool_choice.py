"""Which tools a request lets the model call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from qvl.errors import RequestError

if TYPE_CHECKING:
    from qvl.pipeline.parse_request import RequestParams, ToolLike


def choose_tools(tools: Sequence[ToolLike], choice: str | Mapping[str, object]) -> RequestParams:
    """Return the parameters for a `tool_choice` in the form of chat completions, or of responses, which nests less.

    With `allowed_tools` the model is shown those tools alone, so that it can call no other.

    Raises:
        RequestError: one of the allowed tools is not among `tools`.
    """
    if isinstance(choice, str):
        return {"tool_choice": choice}
    if choice["type"] != "allowed_tools":
        return {"tool_choice": _name(choice)}
    nested = "allowed_tools" in choice
    allowed = cast("Mapping[str, object]", choice["allowed_tools"] if nested else choice)
    names = [_name(tool) for tool in cast("Sequence[Mapping[str, object]]", allowed["tools"])]
    known = {_name(cast("Mapping[str, object]", tool)): tool for tool in tools}
    for number, name in enumerate(names):
        if name not in known:
            where = f"allowed_tools.tools[{number}].function" if nested else f"tools[{number}]"
            param, hint = f"tool_choice.{where}.name", f"known: {', '.join(known) or 'none'}"
            raise RequestError(f"{param}: unknown tool {name!r}", hint=hint, param=param, code="invalid_value")
    return {"tools": [tool for name, tool in known.items() if name in names], "tool_choice": str(allowed["mode"])}


def _name(tool: Mapping[str, object]) -> str:
    return str(cast("Mapping[str, object]", tool.get("function", tool))["name"])
