"""Whose a prompt strategy is, and what its texts depend on."""

import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

Transform = Callable[[dict[str, Any]], Any]


def is_axolotls(transform: Transform) -> bool:
    """Whether a strategy is one of axolotl's that put words into a template of their own, so that special tokens in a
    row are words. `passthrough` takes rows that are rendered already."""
    name = _module_of(transform)
    return name.startswith("axolotl.") and not name.endswith(".passthrough")


def defined_by_axolotl(transform: Transform) -> bool:
    """Whether a strategy reads nothing but its data set's entry in the YAML; rows without a `type:` go through one of ours."""
    return _module_of(transform).startswith(("axolotl.", "bapo_plugin."))


def _module_of(transform: Transform) -> str:
    function: Any = transform
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) or ""


def takes_rendered(kind: Any) -> bool:
    """Whether a `type:` of the user's own has a format that adds nothing to a prompt: then rows are rendered already."""
    return isinstance(kind, Mapping) and kind.get("prompt_format") in (None, "", "{prompt}")


def source_of(transform: Transform) -> list[tuple[str, str]]:
    """(module, source text) of all modules of a strategy of the user's own, also of those that it imports: for a
    cache key. Installed packages are left out; their versions are their own."""
    function: Any = transform
    while isinstance(function, functools.partial):
        function = function.func
    installed = tuple(
        sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    found: dict[str, str] = {}
    waiting = [inspect.getmodule(function)]
    while waiting:
        module = waiting.pop()
        path = getattr(module, "__file__", None)
        if module is None or module.__name__ in found or not path or path.startswith(installed):
            continue
        found[module.__name__] = Path(path).read_text("utf-8", errors="replace")
        for value in vars(module).values():
            name = (
                value.__name__
                if isinstance(value, ModuleType)
                else getattr(value, "__module__", None)
            )
            waiting.append(sys.modules.get(name) if isinstance(name, str) else None)
    return sorted(found.items())
