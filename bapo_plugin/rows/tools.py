"""Tools of a row and calls of them, as chat templates want them."""

import json
from collections.abc import Mapping
from typing import Any

from bapo_plugin.rows.errors import RowError, kind_of


def read_tool_call(call: Any, name: str) -> dict[str, Any]:
    """As templates want it: {"function": {"name", "arguments"}}, arguments as a mapping, and nothing that only Arrow
    put there."""
    call = _without_null(call)
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f"a tool call of {name} is {str(call)[:60]!r}; it must have a function with a name"
        )
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return call


def read_tools(tools: Any, column: str) -> list[dict] | None:
    written = isinstance(tools, str)  # as text, with nothing that Arrow put there
    if written and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError(
                f"tools is text that is no JSON (column {column!r}); mend it, or leave it empty"
            ) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(
            f"tools is {kind_of(tools)} (column {column!r}); it must be a list of JSON schemas"
        )
    if any(not isinstance(tool.get("function", tool), Mapping) for tool in tools):
        raise RowError(f"tools has an entry that is no function (column {column!r})")
    return [dict(tool) if written else _without_null(tool) for tool in tools]


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_null(v) for v in value]
    return value
