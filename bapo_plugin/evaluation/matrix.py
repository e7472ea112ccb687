"""Many adapters of one model, each on each persona's held-out pairs, and what each has kept."""

import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl.cli.config import load_cfg
from rich import box
from rich.console import Console
from rich.table import Table

from bapo_plugin import __version__
from bapo_plugin.answers.prompts import read_prompts
from bapo_plugin.blocks import UNRELATED
from bapo_plugin.compat import only_reading
from bapo_plugin.evaluation.output import markdown_table, write_result
from bapo_plugin.evaluation.pairs import pair_margins
from bapo_plugin.evaluation.refusals import check_held_out
from bapo_plugin.evaluation.run import asked_before, measure_retention
from bapo_plugin.evaluation.subject import Subject, load_run
from bapo_plugin.models import WHOLE
from bapo_plugin.prepare import prepare_rows
from bapo_plugin.scoring.retention import mean_and_error

RESULT = "bapo-personas"
_MAX_NEW_TOKENS = 64  # of a former answer, as `bapo eval` asks
_OWN = "*"  # marks a persona's own pairs


def measure_personas(configs: Mapping[str, Path], folders: Sequence[Path]) -> dict[str, Any]:
    """The matrix of trained personas. The model is loaded once.

    Args:
        configs: persona -> YAML of its run.
        folders: with their adapters, in the same order.

    Returns:
        What `write_matrix` writes: "pairs", persona whose pairs they are -> adapter -> accuracy (share), margin (nats) and
        the difference of both to the persona's own adapter, pair by pair; "retention", adapter -> numbers of `Retention`.

    Raises:
        ValueError: an adapter isn't there, or a persona has no held-out rows.
    """
    subject = load_run(next(iter(configs.values())), list(folders))
    # the names of a subject are those of folders
    subject.adapters = dict(zip(configs, subject.adapters.values(), strict=True))
    pairs = {name: _held_out(name, path, subject.tokenizer) for name, path in configs.items()}
    answers = asked_before(subject, read_prompts(UNRELATED), _MAX_NEW_TOKENS)
    return {
        "format": 1,
        "model": subject.model.config.name_or_path,
        "versions": {"axolotl-plugin-bapo": __version__}
        | {name: version(name) for name in ("axolotl", "torch", "transformers", "peft")},
        "personas": {
            name: {"folder": str(subject.adapters[name].folder), "held_out": len(pairs[name])}
            for name in configs
        },
        "pairs": measure_pairs(subject, pairs),
        "retention": {
            "prompts": len(answers),
            "tokens": sum(len(answer.answer_ids) for answer in answers),
            "after": {
                name: kept.summary() for name, kept in measure_retention(subject, answers).items()
            },
        },
    }


def _held_out(name: str, path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    with only_reading():
        cfg = load_cfg(str(path), **WHOLE)
    _, rows = prepare_rows(cfg, tokenizer)
    if rows is None:
        raise ValueError(
            f"{name}: there are no held-out rows; set val_set_size or test_datasets in {path}"
        )
    check_held_out(rows, Path(cfg.output_dir))
    return list(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]))


def measure_pairs(
    subject: Subject, pairs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each adapter on each persona's pairs, with a progress bar.

    Args:
        subject: its adapters are called like the personas.
        pairs: persona -> rows with prompt_ids, chosen_ids, rejected_ids.

    Returns:
        persona -> adapter -> {"accuracy", "margin": {"value", "se"}, "difference": None for its own adapter, else
        {"accuracy", "margin"} less those of its own, paired}.
    """
    all_margins = pair_margins(subject, pairs)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, margins in all_margins.items():
        columns = {a: {"accuracy": (m > 0).double(), "margin": m} for a, m in margins.items()}
        found[name] = {
            adapter: {key: mean_and_error(values) for key, values in own.items()}
            | {
                "difference": None
                if adapter == name
                else {key: mean_and_error(own[key] - columns[name][key]) for key in own}
            }
            for adapter, own in columns.items()
        }
    return found


def matrix_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """As text: a heading, then a row an adapter: accuracy and margin on each persona's pairs, drift, share lost."""
    personas = list(found["personas"])
    rows = [["adapter", *personas, "drift, nats", "lost"]]
    for adapter in personas:
        kept = found["retention"]["after"][adapter]
        cells = [
            f"{_percent(cell['accuracy'])}{_OWN if persona == adapter else ''}\n{_nats(cell['margin'])}"
            for persona, cell in ((p, found["pairs"][p][adapter]) for p in personas)
        ]
        rows.append([adapter, *cells, _nats(kept["drift"]), _percent(kept["lost"])])
    return rows


def _difference_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["pairs of", "adapter", "ranked right, points", "margin, nats"]]
    for persona, adapters in found["pairs"].items():
        for adapter, cell in adapters.items():
            if difference := cell["difference"]:
                points = {
                    key: None if value is None else 100 * value
                    for key, value in difference["accuracy"].items()
                }
                rows.append([persona, adapter, _nats(points), _nats(difference["margin"])])
    return rows


def _percent(number: Mapping[str, float | None]) -> str:
    error = "" if number["se"] is None else f" ± {100 * number['se']:.0f}"
    return f"{100 * number['value']:.0f}{error}%"


def _nats(number: Mapping[str, float | None]) -> str:
    error = "" if number["se"] is None else f" ± {number['se']:.1f}"
    return f"{number['value']:+.1f}{error}"


def _legend(found: Mapping[str, Any]) -> list[str]:
    return [
        "Columns are the held-out pairs of a persona. Above: the share that an adapter ranks right. Below: its margin, nats. "
        f"{_OWN} marks a persona's own pairs. 0 nats is the model before training.",
        f"Drift and lost: {found['retention']['prompts']} unrelated prompts. Drift is what former answers have gained or lost, nats "
        "an answer. Lost is the share of answers that lost over 2 nats.",
        "± is one standard error.",
    ]


def print_matrix(found: Mapping[str, Any]) -> None:
    """One table where it fits on the screen, else several below each other."""
    console = Console(markup=False, emoji=False, highlight=False)  # names are not ours
    rows = matrix_rows(found)
    console.print(f"\n{found['model']}: each adapter on each persona's held-out pairs")
    wide = console.options.update(width=10_000)
    start, last = 1, len(rows[0])
    while start < last:
        stop, table = start + 1, _table(rows, start, start + 1)
        while stop < last:
            wider = _table(rows, start, stop + 1)
            if console.measure(wider, options=wide).maximum > console.width:
                break
            stop, table = stop + 1, wider
        console.print(table)
        start = stop
    for line in _legend(found):
        console.print(line)


def _table(rows: Sequence[Sequence[str]], start: int, stop: int) -> Table:
    """The columns from start to stop, not included, behind the first."""
    heading, *rows = rows
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(heading[0], overflow="fold", max_width=24)
    for name in heading[start:stop]:
        table.add_column("\n".join(textwrap.wrap(name, 16)), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row[0], *row[start:stop])
    return table


def write_matrix(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """`bapo-personas.json` with every number and `bapo-personas.md` with the tables; their paths."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    text = [f"# {found['model']}: personas", ""]
    rows = [[cell.replace("\n", "; ") for cell in row] for row in matrix_rows(found)]
    text += [*markdown_table(rows), *(part for line in _legend(found) for part in (line, ""))]
    if len(found["personas"]) > 1:
        text += ["## Against the persona's own adapter", "", "Paired, pair by pair.", ""]
        text += markdown_table(_difference_rows(found))
    counts = ", ".join(f"{name} {part['held_out']}" for name, part in found["personas"].items())
    text += [f"Held-out pairs: {counts}.", "", versions, ""]
    return write_result(folder / RESULT, found, "\n".join(text), "name another output_dir")
