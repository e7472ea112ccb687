"""A YAML as it is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys and values of a file.

    Raises:
        ValueError: it can't be read, is no YAML, or no block of settings.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except Exception as error:  # PyYAML's own, and what it runs into with dates, numbers and depth
        shown = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} can't be read as YAML: {shown}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must be a block of settings, `key: value` on each line, not {str(found)[:40]!r}"
        )
    return found


def repeated_keys(path: Path) -> Iterator[tuple[str, int, int]]:
    """(dotted key, line, line of the last) of keys that stand twice in a block: YAML takes the last one without a
    word. Lines are counted from 1.

    Args:
        path: of a file that `read_yaml` can read.
    """
    waiting = [(yaml.compose(path.read_text("utf-8"), yaml.SafeLoader), "")]
    seen = set()
    while waiting:
        node, place = waiting.pop()
        if id(node) in seen:  # an alias may lead back to its anchor
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{place}[{i}]") for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, list[int]] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = f"{place}.{key.value}" if place else key.value
                lines.setdefault(name, []).append(key.start_mark.line + 1)
                waiting.append((value, name))
        for name, found in lines.items():
            if len(found) > 1:
                yield name, found[0], found[-1]
