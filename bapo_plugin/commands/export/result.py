"""What an export has to say: facts, what deserves a look, and the commands that come next."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

ELSEWHERE = "name another --output"
_WIDTH = 80


@dataclass(frozen=True)
class Command:
    """A command to be pasted.

    Args:
        about: what it does.
        parts: its words, in groups that stay on one line.
    """

    about: str
    parts: Sequence[Sequence[str]]

    def line(self) -> str:
        """On one line, quoted for a shell."""
        return " ".join(map(shlex.join, self.parts))

    def lines(self) -> list[str]:
        """On as many lines as fit a narrow screen, each but the last with a backslash."""
        if len(self.line()) + 2 <= _WIDTH:
            return [self.line()]
        lines = [shlex.join(self.parts[0])]
        for group in self.parts[1:]:
            text = shlex.join(group)
            # room for the backslash and the indentation of the screen
            if len(lines[-1]) + len(text) + 5 <= _WIDTH:
                lines[-1] += f" {text}"
            else:
                lines.append(f"    {text}")
        return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


@dataclass
class Result:
    """What was done.

    Args:
        facts: (label, text) for the screen.
        notes: what deserves a look.
        wrote: files and folders.
        commands: what comes next.
        found: the same facts and others for programs.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrote: list[Path] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def show(self) -> None:
        """Print it for people."""
        console = Console(markup=False, emoji=False, highlight=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in self.facts:
            table.add_row(label, text)
        console.print(table)
        for note in self.notes:
            console.print(f"! {note}")
        for path in self.wrote:
            console.print(f"Wrote {path}", soft_wrap=True)
        for command in self.commands:
            console.print(f"\n{command.about}:")
            for line in command.lines():
                console.print(f"  {line}", soft_wrap=True)  # to be pasted

    def write_json(self, file: TextIO) -> None:
        """Print it for programs: one object."""
        found = dict(self.facts) | {"notes": self.notes, "wrote": [str(p) for p in self.wrote]}
        found |= self.found | {"next": [command.line() for command in self.commands]}
        print(json.dumps(found, indent=1, ensure_ascii=False), file=file)


def size(number: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"
