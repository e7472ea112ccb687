"""What `bapo plan` does."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from rich.console import Console
from rich.table import Table

from bapo_plugin.planning import memory
from bapo_plugin.planning.architecture import read_config
from bapo_plugin.planning.cards import CARDS, Card, find_card
from bapo_plugin.planning.estimate import PARTS, Estimate, Planner
from bapo_plugin.planning.search import Change, largest, remedies
from bapo_plugin.planning.settings import RunSettings, read_settings
from bapo_plugin.planning.speed import seconds

# a test holds the model to this
ERROR = (
    "What a step allocates is within 4% of the peaks measured on H100 and H200 (benchmarks/results/step-gpu.csv); context and "
    "fragmentation are assumed."
)
TIME_ERROR = (
    "Times are fitted to steps on H100 and H200, within 16% where the card decides; other cards are scaled by their published "
    "figures and weren't measured."
)
_SMALL = memory.GIB // 200  # what a table would show as 0.00
_LETTERS = dict(zip(PARTS, "WRAGOKBDLPUC", strict=True))


def plan(
    path: Path,
    *,
    model_config: Path | None = None,
    gpu: str | None = None,
    vram: float | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    as_json: bool = False,
) -> bool:
    """Print what a run needs and whether it fits.

    Args:
        path: of the YAML.
        model_config: config.json of the model, or a folder that holds it; by default that of `base_model`.
        gpu: name of a card in the table.
        vram: GiB of a card.
        prompt_tokens, response_tokens: of the longest row; by default the worst case of sequence_len.
        as_json: for programs.

    Returns:
        Whether it fits; true where no card was named.

    Raises:
        ValueError: the YAML, the model or the card can't be used.
    """
    card = find_card(gpu) if gpu else None
    settings, written = read_settings(
        path, prompt_tokens=prompt_tokens, response_tokens=response_tokens
    )
    source = model_config or written.get("base_model_config") or settings.base_model
    planner = Planner(read_config(source, settings))
    ours, theirs = planner.bapo(settings), planner.dpo(settings)
    found = _result(path, written, settings, planner, ours, theirs, card, vram)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, settings, ours, theirs, planner.rehearsal(settings).padded_because)
    return found["fits"] is not False


def _result(
    path: Path,
    written: dict[str, Any],
    settings: RunSettings,
    planner: Planner,
    ours: Estimate,
    theirs: Estimate,
    card: Card | None,
    vram: float | None,
) -> dict[str, Any]:
    gib = vram or (card.vram if card else None)
    room = None if gib is None else int(gib * memory.GIB)
    fits = None if room is None else ours.total <= room
    changes: list[Change] = []
    if room is not None:
        changes = (largest if fits else remedies)(planner, settings, room)
    rows = _count_rows(written)
    return {
        "config": str(path),
        "model": settings.base_model,
        "row_tokens": dict(zip(("prompt", "response"), settings.row, strict=True)),
        "tokens_a_pass": {"bapo": ours.tokens, "dpo": theirs.tokens},
        "bytes": {"bapo": ours.parts, "dpo": theirs.parts},
        "total_bytes": {"bapo": ours.total, "dpo": theirs.total},
        "gpu": card.name if card else None,
        "vram_gib": gib,
        "fits": fits,
        ("largest" if fits else "remedies"): [c._asdict() for c in changes],
        "rows": rows,
        "cards": [
            {
                "name": c.name,
                "vram_gib": c.vram,
                "fits": ours.total <= c.vram * memory.GIB,
                "seconds_a_step": settings.gradient_accumulation_steps
                * ours.passes
                * seconds(ours.peaks, c),
                "seconds_a_step_dpo": settings.gradient_accumulation_steps
                * seconds(theirs.peaks, c),
            }
            for c in ([card] if card else CARDS if vram is None else [])
        ],
        "rows_a_step": settings.micro_batch_size * settings.gradient_accumulation_steps,
        "epochs": written.get("num_epochs") or 1,
    }


def _show(
    found: dict[str, Any],
    settings: RunSettings,
    ours: Estimate,
    theirs: Estimate,
    padded_because: str | None,
) -> None:
    console = Console(highlight=False)
    table = Table(title=f"Memory of {found['model']} in GB (2³⁰ bytes)")
    for name, justify in (("", "left"), ("", "left"), ("BAPO", "right"), ("TRL's DPO", "right")):
        table.add_column(name, justify=justify)
    for part, name in PARTS.items():
        if max(ours.parts.get(part, 0), theirs.parts.get(part, 0)) > _SMALL:
            cells = (_gb(e.parts.get(part, 0)) for e in (ours, theirs))
            table.add_row(_LETTERS[part], name, *cells)
    table.add_section()
    table.add_row("", "in all", _gb(ours.total), _gb(theirs.total))
    console.print(table)
    room = None if found["vram_gib"] is None else found["vram_gib"] * memory.GIB
    width = console.width - 12
    whole = max(ours.total, theirs.total, room or 0)
    for name, estimate in (("BAPO", ours), ("TRL's DPO", theirs)):
        console.print(f"{name:10} {_bar(estimate, whole, room, width)}", soft_wrap=True)
    prompt, response = settings.row
    worst = (
        f"the worst case of sequence_len: {settings.sequence_len:,}"
        if settings.prompt_tokens is None and settings.response_tokens is None
        else "as given"
    )
    console.print(
        f"\nRows of {settings.micro_batch_size} with {prompt:,} + {response:,} tokens of prompt and response, {worst}; "
        f"{ours.tokens:,} tokens in a pass, with DPO's padded rows {theirs.tokens:,}."
    )
    if padded_because:
        console.print(f"The prompt isn't shared: {padded_because}.")
    console.print(ERROR)
    for note in _notes(settings):
        console.print(note)
    _show_time(console, found)
    if room is not None:
        console.print("\n" + _verdict(found, ours.total, room), style="bold")


def _notes(settings: RunSettings) -> list[str]:
    """What this run has that isn't modelled."""
    notes = [
        "Making base responses before training takes memory of its own: bapo.anchors.batch_tokens."
    ]
    if settings.dtype == torch.float32:
        notes.append("bf16 and fp16 are off: computed in fp32.")
    if not memory.knows_optimizer(settings.optimizer):
        notes.append(
            f"optimizer: {settings.optimizer} isn't known here and counted as adamw_torch."
        )
    if settings.optimizer.startswith("paged"):
        notes.append(
            "Paged states of the optimiser are counted in full, though they may move to the host."
        )
    return notes


def _gb(size: int) -> str:
    return f"{size / memory.GIB:.2f}"


def _bar(estimate: Estimate, whole: float, room: float | None, width: int) -> str:
    """A letter for each part's share of `whole`; points up to the card's end, which is a bar."""
    text, end = "", 0.0
    for part, size in estimate.parts.items():
        end += size
        text += _LETTERS[part] * (round(end / whole * width) - len(text))
    if room is None:
        return text
    edge = round(room / whole * width)
    return text.ljust(edge, "·")[:edge] + "|" + text[edge:]


def _verdict(found: dict[str, Any], total: int, room: float) -> str:
    where = f"{found['vram_gib']:g} GB" + (f" ({found['gpu']})" if found["gpu"] else "")
    if found["fits"]:
        text = f"Fits in {where} with {_gb(room - total)} GB to spare."
        more = [" ".join(_keys(change)) for change in found["largest"]]
        return text + (f" Each alone may go up to {', or '.join(more)}." if more else "")
    text = f"Does not fit: {_gb(total)} of {where}."
    ways = [
        f"{' with '.join(_keys(change))} ({_gb(change['total'])} GB)"
        for change in found["remedies"]
    ]
    if not ways:
        return f"{text} No setting changes that; take a smaller model or a larger card."
    return f"{text} What would: {', or '.join(ways)}."


def _keys(change: dict[str, Any]) -> list[str]:
    written = {True: "true", False: "false"}
    return [
        f"{key}: {written[value] if isinstance(value, bool) else value}"
        for key, value in change["keys"].items()
    ]


def _show_time(console: Console, found: dict[str, Any]) -> None:
    if not found["cards"]:
        return
    rows = found["rows"] or 1000
    steps = -(-rows // found["rows_a_step"])
    what = "an epoch" if found["rows"] else "1,000 rows"
    table = Table(title=f"Time of {what}: {rows:,} rows as long as these, {steps:,} steps")
    for name in ("card", "GB", "BAPO fits", "a step", "BAPO", "TRL's DPO"):
        table.add_column(name, justify="left" if name == "card" else "right")
    for card in found["cards"]:
        step, dpo = card["seconds_a_step"], card["seconds_a_step_dpo"]
        table.add_row(
            card["name"],
            f"{card['vram_gib']:g}",
            "yes" if card["fits"] else "no",
            f"{step:.1f} s",
            _duration(step * steps),
            _duration(dpo * steps),
        )
    console.print(table)
    console.print(TIME_ERROR)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count_rows(written: dict[str, Any]) -> int | None:
    """Rows of the training data, where all of it is local files that are counted cheaply; None else."""
    total = 0
    for entry in written.get("datasets") or []:
        path = Path(str((entry or {}).get("path") or ""))
        if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
            return None
        if path.suffix == ".parquet":
            total += pyarrow.parquet.read_metadata(path).num_rows
        else:
            with path.open("rb") as file:
                total += sum(1 for line in file if line.strip())
    held_out = written.get("val_set_size") or 0
    total -= round(total * held_out) if held_out < 1 else int(held_out)
    return max(0, total) or None
