"""Whole tables of rendered rows: which are odd, cut or too long, and the split by prompt.

Tables may have millions of rows: they are read batch by batch, and at most some bytes of a row are held.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.rows.columns import IDS
from bapo_plugin.rows.errors import SHOWN, report_rows
from bapo_plugin.rows.tokens import READY

LOG = get_logger("axolotl." + __name__)


class Said(NamedTuple):
    """Rows of which the same is said: how many, and the numbers of the first five, from 1."""

    rows: int
    first: list[int]


def finish(rows: Dataset, name: str, sequence_len: int, policy: str, on_cut: str) -> Dataset:
    """Rendered rows with base responses, ready for training: the policies for cut and for long rows applied.

    Args:
        rows: `FEATURES`.
        name: of the data set.
        sequence_len: most tokens of prompt and response.
        policy: "drop", "truncate" or "raise", see `rows.tokens.fit_length`.
        on_cut: what becomes of rows whose base response a limit cut: "keep", "drop" or "error".

    Raises:
        ValueError: cut rows with "error", long ones with "raise", or no row is left.
    """
    # before rows are left out: beside some of a table's rows a column can't be put without writing them anew
    rows = rows.add_column("open_tokens", lengths(rows, "open_ids"))
    rows = _apply_on_cut(rows, name, on_cut)
    long = check_long(rows, name, sequence_len, policy)
    cut = len(where(rows, "length", lambda text: text == "cut"))
    if cut or len(long):
        LOG.warning(
            f"{name}: sequence_len {sequence_len}, counting chosen, rejected and base: {cut:,} rows cut, "
            f"{len(long):,} dropped, {len(rows) - cut - len(long):,} untouched"
        )
    return without(rows, long).select_columns(list(READY))


def check_long(rows: Dataset, name: str, sequence_len: int, policy: str) -> np.ndarray:
    """Indices, int64, of rows that are too long for `sequence_len`.

    Raises:
        ValueError: there are any and the policy is "raise", or all are.
    """
    long = where(rows, "length", lambda text: text == "long")
    if len(long) and policy == "raise":
        raise ValueError(_report_long(name, rows, long, sequence_len))
    if len(long) and len(long) == len(rows):
        raise ValueError(
            f"{name}: all {len(long)} rows are longer than sequence_len: {sequence_len}; raise sequence_len or set "
            "`excess_length_strategy: truncate`"
        )
    return long


def where(rows: Dataset, column: str, wanted: Callable[[Any], bool]) -> np.ndarray:
    """Indices, int64, of rows whose cell is wanted."""
    found = [np.zeros(0, dtype=np.int64)]
    start = 0
    for part in rows.select_columns([column]).iter(batch_size=1000):
        marks = np.fromiter(map(wanted, part[column]), dtype=bool)
        found.append(start + np.flatnonzero(marks))
        start += len(marks)
    return np.concatenate(found)


def lengths(rows: Dataset, *columns: str) -> np.ndarray:
    """How many tokens each row has in these columns together, int32."""
    found = [np.zeros(0, dtype=np.int32)]
    for part in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000):
        counts = [pc.list_value_length(part[column]).to_numpy() for column in columns]
        found.append(np.sum(counts, axis=0, dtype=np.int32))
    return np.concatenate(found)


def overlap(train: Dataset, held_out: Dataset) -> int:
    """How many held-out rows have a prompt that is in training too."""
    return int(np.isin(_asked(held_out), _asked(train)).sum())


def kept_among(rows: Dataset, kept: Dataset) -> int:
    """How many rows have a prompt that is kept too.

    Args:
        rows: prepared rows.
        kept: prepared prompts of `bapo.keep`.
    """
    return int(np.isin(_asked(rows), _asked(kept)).sum())


def split_by_prompt(rows: Dataset, size: int | float) -> tuple[Dataset, Dataset]:
    """The last rows held out, with all rows of their prompts: no prompt is on both sides.

    Args:
        rows: prepared rows.
        size: number of rows to hold out, or their share. Where prompts have several rows it may be some more.

    Raises:
        ValueError: no row is left on a side.
    """
    count = math.ceil(size * len(rows)) if isinstance(size, float) else size
    if not 0 < count < len(rows):
        raise ValueError(
            f"val_set_size: {size} would hold out {count} of {len(rows)} rows; leave at least one on each side"
        )
    prompts = _asked(rows)
    values, inverse, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    held = np.zeros(len(values), dtype=bool)
    total = 0
    for group in inverse[::-1]:
        if total >= count:
            break
        if not held[group]:
            held[group] = True
            total += sizes[group]
    if total == len(rows):
        raise ValueError(
            f"val_set_size: {size} can't be held out: {len(values)} distinct prompts in {len(rows)} rows, and rows of one "
            "prompt stay together, so none would be left to train on; lower it, or name test_datasets"
        )
    if total > count:
        LOG.info(
            f"val_set_size: {total} rows are held out instead of {count}, since rows of one prompt stay together"
        )
    side = held[inverse]
    return rows.select(np.flatnonzero(~side)), rows.select(np.flatnonzero(side))


def _asked(rows: Dataset) -> np.ndarray:
    """64 bits of what the model is asked with in each row."""
    found = [np.zeros(0, dtype=np.int64)]
    for part in rows.select_columns(["asked"]).with_format("arrow").iter(batch_size=10_000):
        found.append(part["asked"].to_numpy())
    return np.concatenate(found)


def notices_of(rows: Dataset) -> dict[str, Said]:
    """What is odd in rows -> how many are so."""
    odd = where(rows, "notice", lambda text: text != "")
    return _said(
        (row, part) for row, text in numbered(rows, odd, "notice") for part in text.split("; ")
    )


def problems_of(rows: Dataset) -> dict[str, Said]:
    """What makes rows unusable -> how many are so."""
    faulty = where(rows, "problem", lambda text: text != "")
    return _said(numbered(rows, faulty, "problem"))


def _said(pairs: Iterator[tuple[int, str]]) -> dict[str, Said]:
    found: dict[str, Said] = {}
    for row, text in pairs:
        count, first = found.get(text, Said(0, []))
        found[text] = Said(count + 1, [*first, row] if count < 5 else first)
    return found


def _apply_on_cut(rows: Dataset, name: str, on_cut: str) -> Dataset:
    if on_cut == "keep" or not len(cut := where(rows, "base_cut", bool)):
        return rows
    if on_cut == "error":
        text = (
            "the base response was cut at {} tokens: raise bapo.anchors.max_new_tokens or sequence_len, or set "
            "bapo.anchors.on_cut: keep or drop"
        )
        first = [
            (row["row"], text.format(len(row["base_ids"]) - len(row["open_ids"])))
            for row in rows.select(cut[:SHOWN])
        ]
        raise ValueError(report_rows(name, len(cut), first, len(rows)))
    LOG.warning(
        f"{name}: {len(cut):,} of {len(rows):,} rows have a base response that was cut and are left out "
        "(bapo.anchors.on_cut: drop)"
    )
    if len(cut) == len(rows):
        raise ValueError(
            f"{name}: no row is left without those whose base response was cut; see bapo.anchors.on_cut"
        )
    return without(rows, cut)


def _report_long(name: str, rows: Dataset, long: np.ndarray, limit: int) -> str:
    first = []
    for row in rows.select(long[:SHOWN]):
        tokens = ", ".join(f"{key.removesuffix('_ids')} {len(row[key])}" for key in IDS)
        first.append(
            (row["row"], f"{tokens} tokens: prompt + response is over sequence_len: {limit}")
        )
    return (
        report_rows(name, len(long), first, len(rows))
        + "\n  Raise sequence_len, or set `excess_length_strategy: drop` or `truncate`."
    )


def numbered(rows: Dataset, indices: np.ndarray, column: str) -> Iterator[tuple[int, str]]:
    """(number in the data set, from 1; cell) of the rows at these indices."""
    for part in rows.select_columns(["row", column]).select(indices).iter(batch_size=1000):
        yield from zip(part["row"], part[column], strict=True)


def without(rows: Dataset, dropped: np.ndarray) -> Dataset:
    """The rows but for those at these indices."""
    if not len(dropped):
        return rows
    kept = np.ones(len(rows), dtype=bool)
    kept[dropped] = False
    return rows.select(np.flatnonzero(kept))


def as_table(rows: Dataset, num_proc: int | None = None) -> Dataset:
    """Rows of which some were left out as a table of their own: what follows would look each row up.

    Args:
        rows: of any columns.
        num_proc: processes.
    """
    if rows._indices is None:
        return rows
    # `Dataset.flatten_indices` makes Python values of all cells
    whole = rows.with_format("arrow").map(
        _itself, batched=True, num_proc=num_proc, desc="Leaving rows out"
    )
    return whole.with_format(None)


def _itself(table: Any) -> Any:
    return table
