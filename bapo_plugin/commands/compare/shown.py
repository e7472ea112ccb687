"""A comparison on the screen, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from bapo_plugin.commands.compare.measures import DRAWS, Level, Measure
from bapo_plugin.commands.compare.results import Result
from bapo_plugin.commands.compare.words import conclusions

_LONGEST = 160  # characters of a setting on the screen

# a key, and its value in each run whose settings are known
Settings = Sequence[tuple[str, Sequence[str | None]]]


@dataclass(frozen=True)
class Comparison:
    """All that is to be shown. `known` are the runs ("A", "B") whose settings are known; `failed` are names in `limits`."""

    a: Result
    b: Result
    known: Sequence[str]
    settings: Settings
    measures: Sequence[Measure]
    levels: Sequence[Level]
    notes: Sequence[str]
    limits: dict[str, float]
    failed: Sequence[str]

    @property
    def said(self) -> list[str]:
        return conclusions(self.measures, self.levels)


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)  # names are not ours


def print_settings(targets: Sequence[str], known: Sequence[str], settings: Settings) -> None:
    """Which runs these are, as they were named, and the settings in which they differ."""
    console = _console()
    for name, target in zip("AB", targets, strict=True):
        console.print(f"{name}  {target}")
    console.print()
    if len(known) < len(targets):
        missing = " and ".join(name for name in "AB" if name not in known)
        console.print(
            f"Settings of {missing} are unknown: neither bapo_run.json nor README.md nor debug.log has them."
        )
        return
    if not settings:
        console.print("No setting differs.")
        return
    table = Table(box=box.SIMPLE_HEAD, title="Settings that differ", title_justify="left")
    for head in ("key", *known):
        table.add_column(head, overflow="fold")
    for key, values in settings:
        table.add_row(key, *_shortened(values))
    console.print(table)


def _shortened(values: Sequence[str | None]) -> list[str]:
    """Long values from where they begin to differ."""
    texts = ["not set" if value is None else value for value in values]
    if max(map(len, texts)) <= _LONGEST:
        return texts
    same = next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1),
        min(map(len, texts)),
    )
    start = max(0, same - 20)
    return [
        ("…" if start else "") + text[start : start + _LONGEST] + ("…" if text[start + _LONGEST :] else "")
        for text in texts
    ]  # fmt: skip


def print_comparison(found: Comparison) -> None:
    """Numbers of A and B, what they say, and what is missing."""
    console = _console()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for head in ("n", "A", "B", "B - A"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("B is", no_wrap=True)
    _add(table, found.measures)
    for level in found.levels:
        unit = f"{level.value:.2f} nats" if level.of == "margin" else f"{level.value:.3f}"
        of_a, of_b = level.strengths
        table.add_row(f"at equal {level.of}, {unit}", "", f"× {of_a:.2f}", f"× {of_b:.2f}", "", "")
        _add(table, level.measures, heading=False)
    console.print(table)
    for line in (*_legend(found), "", *found.said):
        console.print(line)
    for note in found.notes:
        text, _, command = note.partition("\n")
        console.print(f"Note: {text}")
        if command:
            console.print(f"  {command}", soft_wrap=True)  # to be copied
    for name, least in found.limits.items():
        if name in found.failed:
            gain = next(m.gain for m in _every(found) if m.key == name)
            console.print(f"Below: {name} is {gain:+.4g}, less than {least:+.4g}.")


def _legend(found: Comparison) -> list[str]:
    lines = [
        "± is one standard error of B - A, row by row. The last column says what is beyond two of them."
    ]
    if any(m.key.endswith("worst_tenth") for m in found.measures) or found.levels:
        what = "The worst tenth" + (" and the numbers at equal taste" if found.levels else "")
        lines.append(f"{what}: bootstrap, {DRAWS} draws.")
    if found.levels:
        lines.append(
            "At equal taste: each adapter at the strength (×) where it reaches the lower of the two levels, linear between "
            "the strengths that were measured."
        )
    return lines


def _add(table: Table, measures: Sequence[Measure], heading: bool = True) -> None:
    of = None
    for m in measures:
        is_first = m.of != of
        if heading and is_first:
            table.add_row(m.of, "" if m.of == "tasks" else str(m.n), "", "", "", "")
        of = m.of
        number = str(m.n or "") if m.of == "tasks" else ""
        error = "" if m.se is None else f" ± {m.se:.3f}"
        # a margin may well be too high
        words = ("higher", "lower") if m.key == "margin" else ("better", "worse")
        word = words[m.gain < 0] if m.is_clear else ""
        table.add_row(
            f"  {m.label}", number, f"{m.a:.3f}", f"{m.b:.3f}", f"{m.difference:+.3f}{error}", word
        )


def _every(found: Comparison) -> list[Measure]:
    return [*found.measures, *(m for level in found.levels for m in level.measures)]


def write_json(found: Comparison, file: TextIO) -> None:
    """One object: `a`, `b`, `settings`, `measures`, `levels`, `conclusions`, `notes`, `limits`, `failed`."""
    content: dict[str, Any] = {
        "format": 1,
        **{
            name: {
                "folder": str(result.folder),
                "results": str(result.file),
                "adapter": result.name,
                "model": result.found.model,
            }
            for name, result in (("a", found.a), ("b", found.b))
        },
        "settings": {
            key: dict(zip((name.lower() for name in found.known), values, strict=True))
            for key, values in found.settings
        }
        if len(found.known) == 2
        else None,
        "measures": {
            m.key: {
                "of": m.of,
                "n": m.n,
                "a": m.a,
                "b": m.b,
                "difference": m.difference,
                "difference_se": m.se,
                "gain": m.gain,
            }
            for m in _every(found)
        },
        "levels": {
            level.of: {"value": level.value, "strength": dict(zip("ab", level.strengths, strict=True))}
            for level in found.levels
        },
        "conclusions": found.said,
        "notes": list(found.notes),
        "limits": found.limits,
        "failed": list(found.failed),
    }  # fmt: skip
    json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
    file.write("\n")
