"""What `bapo anchors` does."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bapo_plugin.anchors.generate import (
    add_anchors,
    explain,
    make_plan,
    missing_rows,
    settings,
    store_path,
)
from bapo_plugin.config import is_active
from bapo_plugin.prepare import open_sources, reference_adapter
from bapo_plugin.rows.strategies import GENERATED, GENERATED_CUT, Source
from bapo_plugin.store import Store


def write_anchors(config: Path, output: Path | None) -> None:
    """Make what is missing; write rows with base responses.

    Raises:
        ValueError: the configuration is not one of BAPO, or as `add_anchors`.
    """
    cfg, tokenizer, sources, places = _open(config)
    if settings(cfg).anchors.on_missing != "generate":
        raise ValueError(
            "bapo.anchors.on_missing must be generate for this command; the YAML says "
            f"{settings(cfg).anchors.on_missing}"
        )
    if not any(missing_rows(source) for source in sources):
        print("Every row has a base response already.")
    done = add_anchors(cfg, tokenizer, sources, reference_adapter(cfg), report=print)
    print(f"The responses are kept in {store_path(cfg)}")
    if output is None or int(os.environ.get("RANK", 0)):
        return
    for source, place in zip(done, places, strict=True):
        path = output
        if len(done) > 1:
            path = output.with_name(f"{output.stem}-{place}{output.suffix}")
        _write(_filled(source), path)
        print(f"Wrote {len(source.rows):,} rows of {source.name} to {path}")


def explain_anchors(config: Path) -> None:
    """Print which responses are reused, which would be made, and why."""
    cfg, tokenizer, sources, _ = _open(config)
    with Store(store_path(cfg), "base responses") as store:
        plan = make_plan(cfg, tokenizer, sources, reference_adapter(cfg), store)
        reasons = explain(plan, store)
    table = Table(title=f"Base responses in {store_path(cfg)}", show_lines=True)
    table.add_column("rows", justify="right")
    table.add_column("what and why", ratio=2)
    table.add_column("first prompts", ratio=2)
    own = sum(key is None for keys in plan.keys for key in keys)
    long = sum(key == "" for keys in plan.keys for key in keys)
    if own:
        table.add_row(str(own), "in the data set itself", "")
    if long:
        table.add_row(str(long), "none: the prompt leaves no room within sequence_len", "")
    for reason, rows, prompts in reasons:
        table.add_row(str(rows), Text(reason), Text("\n".join(prompts)))
    Console().print(table)


def _open(config: Path) -> tuple[Any, Any, list[Source], list[str]]:
    cfg = load_cfg(str(config))
    if not is_active(cfg):
        raise ValueError(
            f"{config} is not a configuration of BAPO: it needs `rl: bapo` (and, before axolotl 0.21, "
            "`plugins: [bapo_plugin.BAPOPlugin]`)"
        )
    tokenizer = load_tokenizer(cfg)
    sources: list[Source] = []
    places: list[str] = []
    for split in ("datasets", "test_datasets"):
        found = open_sources(cfg, tokenizer, split) if cfg[split] else []
        sources += found
        places += [f"{split}{i}" for i in range(len(found))]
    return cfg, tokenizer, sources, places


def _filled(source: Source) -> Dataset:
    """The raw rows, with the generated responses in the base column and marks of those that were cut."""
    rows, renderer = source.rows, source.renderer
    if GENERATED not in rows.column_names:
        return rows
    name = renderer.field_base
    own: Sequence[Any] = rows[name] if name in rows.column_names else [None] * len(rows)
    marks = f"{name}_cut"
    cut = rows[marks] if marks in rows.column_names else [False] * len(rows)
    like = next((v for v in own if v), "")
    base, base_cut = [], []
    for value, old, text, limit in zip(own, cut, rows[GENERATED], rows[GENERATED_CUT], strict=True):
        base.append(value if text is None else renderer.wrap(text, like))
        base_cut.append(bool(old) if text is None else limit)
    drop = [c for c in (GENERATED, GENERATED_CUT, name, marks) if c in rows.column_names]
    rows = rows.remove_columns(drop)
    return rows.add_column(name, base).add_column(marks, base_cut)


def _write(rows: Dataset, path: Path) -> None:
    """As a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".parquet":
            rows.to_parquet(str(partial))
        else:
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
