"""What `bapo eval` found, as a table on the terminal and as files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bapo_plugin.files import write_whole

RESULT = "bapo-eval"
ELSEWHERE = "name another folder with --output"
_AT_CHANCE = "at chance: the accuracy before is within two standard errors of guessing, so that a difference says little"


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The results as text: a heading, then one row a number, `before` and for each adapter `after`."""
    names = list(found["adapters"])
    rows = [["what", "before", *_headings(names)]]
    for of, _, label, before, after in _former(found):
        rows.append([f"{of}: {label}", before, *(cell for name in names for cell in after[name])])
    for entry in found["tasks"]:
        rows.append([f"{entry['task']}, {entry['metric']}", *_numbers(entry, names)])
    return rows


def part_rows(found: dict[str, Any]) -> list[list[str]]:
    """Tasks with the number of their questions, then their groups and subjects; a heading first."""
    names = list(found["adapters"])
    rows = [["task", "part", "questions", "chance", "before", *_headings(names)]]
    for entry in found["tasks"]:
        for part in (entry, *entry["parts"]):
            chance = "" if part["chance"] is None else f"{part['chance']:.3f}"
            rows.append(
                [
                    f"{entry['task']}, {entry['metric']}",
                    part.get("name", "all"),
                    str(part["questions"] or ""),
                    f"{chance}, at chance" if part["at_chance"] else chance,
                    *_numbers(part, names),
                ]
            )
    return rows


def _headings(names: Sequence[str]) -> list[str]:
    return [heading for name in names for heading in (name, "difference")]


_RANKED = (
    ("accuracy", "ranked right, share", 0.5),  # no pair has a margin yet: as good as a coin
    ("margin", "margin, nats", 0.0),
)
_KEPT = (
    ("drift", "drift, nats an answer", 0.0),
    ("drift_per_token", "drift, nats a token", 0.0),
    ("lost", "share that lost over 2 nats", 0.0),
    ("worst_tenth", "drift of the worst tenth", 0.0),
    ("agreement", "same likeliest token", 1.0),
    ("kl", "KL(before ‖ after), nats a token", 0.0),
)
_REPETITION = (
    ("repetition", "repeated 4-grams, share"),
    ("repetition_worst_tenth", "repeated 4-grams, worst tenth"),
)


def _former(
    found: dict[str, Any],
) -> Iterator[tuple[str, int, str, str, dict[str, tuple[str, str]]]]:
    """(of what, how many, label, before, adapter -> (after, difference)) of pairs and former answers."""
    if pairs := found["pairs"]:
        of, n, after = "held-out pairs", pairs["pairs"], pairs["after"]
        for key, label, at_start in _RANKED:
            yield of, n, label, _short(at_start, None), _since(after, key, at_start)
    for part, of in (("retention", "former answers"), ("probe", "unrelated prompts")):
        measured = found[part]
        if not measured:
            continue
        for key, label, at_start in _KEPT:
            after = _since(measured["after"], key, at_start)
            yield of, measured["prompts"], label, _short(at_start, None), after
        for key, label in _REPETITION:
            if before := measured["before"].get(key):
                after = {
                    # scaled adapters weren't asked
                    name: _after(numbers[key]) if key in numbers else ("", "")
                    for name, numbers in measured["after"].items()
                }
                yield of, measured["prompts"], label, _short(before["value"], None), after


def _since(
    after: dict[str, dict[str, Any]], key: str, at_start: float
) -> dict[str, tuple[str, str]]:
    """adapter -> (after, difference), where the number before is a constant."""
    return {
        name: (_short(**numbers[key]), f"{numbers[key]['value'] - at_start:+.3f}")
        for name, numbers in after.items()
    }


def _numbers(measured: dict[str, Any], names: Sequence[str]) -> list[str]:
    """before, and for each adapter after and difference."""
    return [
        _short(**measured["before"]),
        *(cell for name in names for cell in _after(measured["after"][name])),
    ]


def _after(part: dict[str, Any]) -> tuple[str, str]:
    if part["difference"] is None:
        return "", ""
    difference = f"{part['difference']:+.3f}"
    if part["difference_se"] is not None:
        difference += f" ± {part['difference_se']:.3f}"
    return _short(part["value"], part["se"]), difference


def _short(value: float, se: float | None) -> str:
    return f"{value:.3f}" + ("" if se is None else f" ± {se:.3f}")


def _screen(found: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, tuple[str, str]]]]:
    """(what, number of questions, before, adapter -> (after, difference)).

    Groups with a task's first metric only, subjects not at all: the rest is for the files.
    """
    heading = None
    for of, number, label, before, after in _former(found):
        if of != heading:
            yield of, str(number), "", dict.fromkeys(after, ("", ""))
            heading = of
        yield f"  {label}", "", before, after
    shown = set()
    for entry in found["tasks"]:
        groups = [part for part in entry["parts"] if part["kind"] == "group"]
        for part in (entry, *(groups if entry["task"] not in shown else ())):
            label = f"  {part['name']}" if "name" in part else f"{entry['task']}, {entry['metric']}"
            before = ("≈ " if part["at_chance"] else "") + _short(**part["before"])
            after = {name: _after(numbers) for name, numbers in part["after"].items()}
            yield label, str(part["questions"] or ""), before, after
        shown.add(entry["task"])


def print_table(found: dict[str, Any]) -> None:
    """A column for each adapter where they fit on the screen, else a row for each."""
    console = Console(markup=False, emoji=False)  # names are not ours
    names = list(found["adapters"])
    rows = list(_screen(found))
    side_by_side = _table(found, rows, _headings(names))
    for label, number, before, after in rows:
        side_by_side.add_row(
            label, number, before, *(cell for name in names for cell in after[name])
        )
    wide = console.options.update(width=10_000)
    if len(names) == 1 or console.measure(side_by_side, options=wide).maximum <= console.width:
        console.print(side_by_side)
        return
    table = _table(found, rows, ["adapter", "after", "difference"])
    for label, number, before, after in rows:
        for i, name in enumerate(names):
            shown = (label, number, before) if i == 0 else ("", "", "")
            value, difference = after[name]
            if difference:
                value, _, error = value.partition(" ± ")
                if (
                    error and "±" not in difference
                ):  # before is a constant: both have the same error
                    difference += f" ± {error}"
            table.add_row(*shown, name, value, difference)
    console.print(table)


def _table(found: dict[str, Any], rows: list, headings: Sequence[str]) -> Table:
    marked = any(before.startswith("≈") for _, _, before, _ in rows)
    table = Table(
        title=f"{found['model']} before and after training; ± is one standard error",
        caption=f"≈ {_AT_CHANCE}" if marked else None,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("what", overflow="fold")
    for heading in ("n", "before", *headings):
        if heading == "adapter":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def _markdown(found: dict[str, Any]) -> str:
    text = [f"# {found['model']} before and after training", ""]
    for part, of in (("retention", "Former answers"), ("probe", "Unrelated prompts")):
        if found[part]:
            text += [
                f"{of}: {found[part]['prompts']} prompts, {found[part]['tokens']} tokens.",
                "",
            ]
    text += ["± is one standard error; that of a difference is paired, question by question.", ""]
    text += markdown_table(table_rows(found))
    if found["tasks"]:
        text += ["## Tasks by group and subject", "", f"{_AT_CHANCE.capitalize()}.", ""]
        if found["data"]:
            text += [f"Questions of files in {found['data']}.", ""]
        text += markdown_table(part_rows(found))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*text, versions, ""])


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first row is the heading."""

    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
        )

    heading, *rows = rows
    return [line(heading), line(["---"] * len(heading)), *map(line, rows), ""]


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    return write_result(folder / RESULT, found, _markdown(found), ELSEWHERE)


def write_result(stem: Path, found: Mapping[str, Any], markdown: str, instead: str) -> list[Path]:
    """`stem`.json with every number and `stem`.md to be read; their paths.

    Raises:
        ValueError: one can't be written; `instead` is what may be done then.
    """
    texts = {".json": json.dumps(found, indent=1, ensure_ascii=False), ".md": markdown}
    paths = {stem.with_name(f"{stem.name}{suffix}"): text for suffix, text in texts.items()}
    for path, text in paths.items():
        write_whole(path, text, instead)
    return list(paths)
