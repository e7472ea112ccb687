"""What `bapo eval` found, as a table on the terminal and as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bapo_plugin.store import write_whole

RESULT = "bapo-eval"


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The results as text: a heading, then one row a number, `before` and for each adapter `after`."""
    names = list(found["adapters"])
    rows = [["what", "before", *[part for name in names for part in (name, "difference")]]]
    if retention := found["retention"]:
        for key, label, at_start in (
            ("drift", "drift of former answers, nats an answer", 0.0),
            ("drift_per_token", "drift, nats a token", 0.0),
            ("agreement", "agreement of the likeliest token", 1.0),
            ("kl", "KL(before ‖ after), nats a token", 0.0),
        ):
            row = [label, _short(at_start, None)]
            for name in names:
                part = retention["after"][name][key]
                row += [_short(part["value"], part["se"]), f"{part['value'] - at_start:+.3f}"]
            rows.append(row)
    for entry in found["tasks"]:
        row = [f"{entry['task']}, {entry['metric']}", _short(**entry["before"])]
        for name in names:
            part = entry["after"][name]
            difference = f"{part['difference']:+.3f}"
            if part["difference_se"] is not None:
                difference += f" ± {part['difference_se']:.3f}"
            row += [_short(part["value"], part["se"]), difference]
        rows.append(row)
    return rows


def _short(value: float, se: float | None) -> str:
    return f"{value:.3f}" + ("" if se is None else f" ± {se:.3f}")


def print_table(found: dict[str, Any]) -> None:
    heading, *rows = table_rows(found)
    title = f"{found['model']} before and after training; ± is one standard error"
    table = Table(title=title)
    for i, name in enumerate(heading):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _markdown(found: dict[str, Any]) -> str:
    heading, *rows = table_rows(found)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    text = [f"# {found['model']} before and after training", ""]
    if found["retention"]:
        text += [
            f"Former answers: {found['retention']['prompts']} prompts, {found['retention']['tokens']} tokens. ± is one "
            "standard error; that of a difference is paired, question by question.",
            "",
        ]
    text += [line(heading), line(["---"] * len(heading)), *map(line, rows), ""]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*text, versions, ""])


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    texts = {
        ".json": json.dumps(found, indent=1, ensure_ascii=False),
        ".md": _markdown(found),
    }
    paths = []
    for suffix, text in texts.items():
        path = folder / f"{RESULT}{suffix}"
        write_whole(path, text)
        paths.append(path)
    return paths
