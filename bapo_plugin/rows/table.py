"""Whole tables of rendered rows: which are faulty, odd, cut or too long, and the split by prompt."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.files import write_whole
from bapo_plugin.rows.columns import IDS
from bapo_plugin.rows.errors import report_rows
from bapo_plugin.rows.tokens import READY

LOG = get_logger("axolotl." + __name__)


class Faults:
    """Collects rows that can't be used, of all data sets, to report or drop them together.

    Args:
        folder: where all of them are written to a file.
        policy: "error" stops when all data sets are seen; "drop" leaves the rows out, counted.
    """

    def __init__(self, folder: Path, policy: str):
        self.path = folder / "bapo-faulty-rows.jsonl"
        self._drop = policy == "drop"
        self._totals: dict[str, int] = {}
        self._faulty: dict[str, list[tuple[int, str]]] = {}
        self._fatal: dict[str, list[tuple[int, str]]] = {}
        self._empty: list[str] = []

    def take(self, name: str, rows: Dataset, total: int) -> Dataset:
        """The rows without faulty ones; what is odd but usable is said once."""
        self._totals[name] = total
        _say_notices(name, rows, total)
        faulty = where(rows, "problem", lambda text: text != "")
        if faulty:
            found = self._faulty if self._drop else self._fatal
            found[name] = numbered(rows, faulty, "problem")
            if self._drop and len(faulty) == len(rows):
                self._empty.append(
                    f"{name}: no row is left without those that can't be used, see {self.path}"
                )
        return without(rows, faulty)

    def take_missing(self, name: str, rows: Dataset, column: str | None, policy: str) -> Dataset:
        """The rows that have a base response; those that have none are skipped, or reported ("error")."""
        lacking = where(rows, "lacks", bool)
        if not lacking:
            return rows
        if policy == "skip":
            LOG.warning(
                f"{name}: {len(lacking):,} of {len(rows):,} rows have no base response and are left out "
                "(bapo.anchors.on_missing: skip)"
            )
            if len(lacking) == len(rows):
                self._empty.append(
                    f"{name}: no row is left without those that have no base response; see bapo.anchors.on_missing"
                )
        else:
            place = f"column {column!r}" if column else "field_base: false"
            text = (
                f"base is missing or empty ({place}); put there what the model answers to the prompt before training, "
                "have it generated (bapo.anchors.on_missing: generate), or remove the row"
            )
            numbers = rows.select_columns(["row"])
            found = self._fatal.setdefault(name, [])
            found += [(numbers[i]["row"], text) for i in lacking]
            found.sort()
        return without(rows, lacking)

    def settle(self, write: bool) -> None:
        """Say what was found.

        Args:
            write: whether this process writes the file.

        Raises:
            ValueError: there are rows that can't be used and may not be dropped, or nothing is left.
        """
        if write and (self._faulty or self._fatal):
            self._write()
        if self._fatal or self._empty:
            messages = [
                report_rows(name, rows, self._totals[name]) for name, rows in self._fatal.items()
            ]
            if self._fatal:
                remedy = f"All of them are in {self.path}. Mend the rows"
                messages.append(
                    remedy
                    + ("." if self._drop else ", or leave them out with `bapo.on_faulty: drop`.")
                )
            raise ValueError("\n".join(messages + self._empty))
        for name, faulty in self._faulty.items():
            LOG.warning(
                f"{name}: {len(faulty):,} of {self._totals[name]:,} rows can't be used and are left out (bapo.on_faulty: "
                f"drop); all of them, with reasons, are in {self.path}. The first is row {faulty[0][0]}: {faulty[0][1]}"
            )

    def _write(self) -> None:
        lines = [
            json.dumps({"data set": name, "row": row, "problem": problem}, ensure_ascii=False)
            for found in (self._faulty, self._fatal)
            for name, rows in found.items()
            for row, problem in rows
        ]
        text = "\n".join(lines) + "\n"
        content = text.encode("utf-8", "backslashreplace")
        write_whole(self.path, content, "name another dataset_prepared_path")


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
    rows = _apply_on_cut(rows, name, on_cut)
    long = check_long(rows, name, sequence_len, policy)
    cut = len(where(rows, "length", lambda text: text == "cut"))
    if cut or long:
        LOG.warning(
            f"{name}: sequence_len {sequence_len}, counting chosen, rejected and base: {cut:,} rows cut, "
            f"{len(long):,} dropped, {len(rows) - cut - len(long):,} untouched"
        )
    rows = without(rows, long)
    counts = np.concatenate(
        [
            np.array([len(ids) for ids in part["open_ids"]], dtype=np.int32)
            for part in rows.select_columns(["open_ids"]).iter(batch_size=10_000)
        ]
    )
    return rows.add_column("open_tokens", counts).select_columns(list(READY))


def check_long(rows: Dataset, name: str, sequence_len: int, policy: str) -> list[int]:
    """Indices of rows that are too long for `sequence_len`.

    Raises:
        ValueError: there are any and the policy is "raise", or all are.
    """
    long = where(rows, "length", lambda text: text == "long")
    if long and policy == "raise":
        raise ValueError(_report_long(name, rows, long, sequence_len))
    if long and len(long) == len(rows):
        raise ValueError(
            f"{name}: all {len(long)} rows are longer than sequence_len: {sequence_len}; raise sequence_len or set "
            "`excess_length_strategy: truncate`"
        )
    return long


def where(rows: Dataset, column: str, wanted: Callable[[Any], bool]) -> list[int]:
    """Indices of rows whose cell is wanted."""
    found: list[int] = []
    start = 0
    for part in rows.select_columns([column]).iter(batch_size=10_000):
        found += [start + i for i, value in enumerate(part[column]) if wanted(value)]
        start += len(part[column])
    return found


def overlap(train: Dataset, held_out: Dataset) -> int:
    """How many held-out rows have a prompt that is in training too."""
    known = set(_prompts(train).tolist())
    return sum(prompt in known for prompt in _prompts(held_out).tolist())


def kept_among(rows: Dataset, kept: Dataset) -> int:
    """How many rows have a prompt that is kept too.

    Args:
        rows: prepared rows.
        kept: prepared prompts of `bapo.keep`, whose `prompt_ids` are all that the model was asked with.
    """
    known = set(_prompts(kept).tolist())
    pairs = zip(_prompts(rows).tolist(), _prompts(rows, opened=True).tolist(), strict=True)
    return sum(not known.isdisjoint(pair) for pair in pairs)


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
    prompts = _prompts(rows)
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


def digest(ids: Any) -> int:
    """64 bits of token ids."""
    raw = np.asarray(ids, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def _prompts(rows: Dataset, opened: bool = False) -> np.ndarray:
    """64 bits of each row's prompt, perhaps with the tokens of its base response that the model was asked with."""
    found = []
    columns = ["prompt_ids", *(["base_ids", "open_tokens"] if opened else [])]
    for part in rows.select_columns(columns).with_format("numpy").iter(batch_size=1000):
        for ids, *more in zip(*(part[name] for name in columns), strict=True):
            whole = np.concatenate([ids, more[0][: more[1]]]) if opened else ids
            found.append(digest(whole))
    return np.array(found, dtype=np.uint64)


def notices_of(rows: Dataset) -> dict[str, list[int]]:
    """What is odd in rows -> their numbers, from 1."""
    odd = where(rows, "notice", lambda text: text != "")
    found: dict[str, list[int]] = {}
    for row, text in numbered(rows, odd, "notice"):
        for part in text.split("; "):
            found.setdefault(part, []).append(row)
    return found


def problems_of(rows: Dataset) -> dict[str, list[int]]:
    """What makes rows unusable -> their numbers, from 1."""
    faulty = where(rows, "problem", lambda text: text != "")
    found: dict[str, list[int]] = {}
    for row, text in numbered(rows, faulty, "problem"):
        found.setdefault(text, []).append(row)
    return found


def _say_notices(name: str, rows: Dataset, total: int) -> None:
    for text, numbers in notices_of(rows).items():
        first = ", ".join(map(str, numbers[:5])) + ("..." if len(numbers) > 5 else "")
        LOG.warning(f"{name}: in {len(numbers):,} of {total:,} rows {text} (rows {first})")


def _apply_on_cut(rows: Dataset, name: str, on_cut: str) -> Dataset:
    cut = where(rows, "base_cut", bool) if on_cut != "keep" else []
    if not cut:
        return rows
    if on_cut == "error":
        text = (
            "the base response was cut at {} tokens: raise bapo.anchors.max_new_tokens or sequence_len, or set "
            "bapo.anchors.on_cut: keep or drop"
        )
        part = rows.select_columns(["row", "base_ids", "open_ids"])
        faulty = [
            (part[i]["row"], text.format(len(part[i]["base_ids"]) - len(part[i]["open_ids"])))
            for i in cut
        ]
        raise ValueError(report_rows(name, faulty, len(rows)))
    LOG.warning(
        f"{name}: {len(cut):,} of {len(rows):,} rows have a base response that was cut and are left out "
        "(bapo.anchors.on_cut: drop)"
    )
    if len(cut) == len(rows):
        raise ValueError(
            f"{name}: no row is left without those whose base response was cut; see bapo.anchors.on_cut"
        )
    return without(rows, cut)


def _report_long(name: str, rows: Dataset, long: list[int], limit: int) -> str:
    faulty = []
    part: Mapping[str, Any]
    for i in long:
        part = rows[i]
        tokens = ", ".join(f"{key.removesuffix('_ids')} {len(part[key])}" for key in IDS)
        faulty.append(
            (part["row"], f"{tokens} tokens: prompt + response is over sequence_len: {limit}")
        )
    return (
        report_rows(name, faulty, len(rows))
        + "\n  Raise sequence_len, or set `excess_length_strategy: drop` or `truncate`."
    )


def numbered(rows: Dataset, indices: list[int], column: str) -> list[tuple[int, str]]:
    """(number in the data set, from 1; cell) of the rows at these indices."""
    part = rows.select_columns(["row", column])
    return [(part[i]["row"], part[i][column]) for i in indices]


def without(rows: Dataset, dropped: list[int]) -> Dataset:
    """The rows but for those at these indices."""
    if not dropped:
        return rows
    kept = np.ones(len(rows), dtype=bool)
    kept[dropped] = False
    return rows.select(np.flatnonzero(kept))
