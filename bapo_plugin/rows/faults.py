"""Rows that can't be used, of all data sets: reported together, or left out."""

import heapq
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from axolotl.utils.logging import get_logger
from datasets import Dataset

from bapo_plugin.files import whole
from bapo_plugin.rows.errors import SHOWN, report_rows
from bapo_plugin.rows.table import notices_of, numbered, where, without

LOG = get_logger("axolotl." + __name__)


class _Faulty(NamedTuple):
    """Rows at the indices `at` of a table. What is wrong is `text`; "": what their column `problem` says."""

    rows: Dataset
    at: np.ndarray
    text: str

    def pairs(self) -> Iterator[tuple[int, str]]:
        """(row number from 1, problem), in order; read anew, so that nothing is held of many rows."""
        for row, problem in numbered(self.rows, self.at, "problem"):
            yield row, self.text or problem


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
        self._faulty: dict[str, list[_Faulty]] = {}
        self._fatal: dict[str, list[_Faulty]] = {}
        self._empty: list[str] = []

    def take(self, name: str, rows: Dataset, total: int) -> Dataset:
        """The rows without faulty ones; what is odd but usable is said once."""
        self._totals[name] = self._totals.get(name, 0) + total
        for text, (count, first) in notices_of(rows).items():
            shown = ", ".join(map(str, first)) + ("..." if count > len(first) else "")
            LOG.warning(f"{name}: in {count:,} of {total:,} rows {text} (rows {shown})")
        faulty = where(rows, "problem", lambda text: text != "")
        if len(faulty):
            found = self._faulty if self._drop else self._fatal
            found.setdefault(name, []).append(_Faulty(rows, faulty, ""))
            if self._drop and len(faulty) == len(rows):
                self._empty.append(
                    f"{name}: no row is left without those that can't be used, see {self.path}"
                )
        return without(rows, faulty)

    def take_missing(self, name: str, rows: Dataset, column: str | None, policy: str) -> Dataset:
        """The rows that have a base response; those that have none are skipped, or reported ("error")."""
        lacking = where(rows, "lacks", bool)
        if not len(lacking):
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
            self._fatal.setdefault(name, []).append(_Faulty(rows, lacking, text))
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
                report_rows(name, _count(parts), _first(parts, SHOWN), self._totals[name])
                for name, parts in self._fatal.items()
            ]
            if self._fatal:
                remedy = f"All of them are in {self.path}. Mend the rows"
                messages.append(
                    remedy
                    + ("." if self._drop else ", or leave them out with `bapo.on_faulty: drop`.")
                )
            raise ValueError("\n".join(messages + self._empty))
        for name, parts in self._faulty.items():
            ((row, problem),) = _first(parts, 1)
            LOG.warning(
                f"{name}: {_count(parts):,} of {self._totals[name]:,} rows can't be used and are left out (bapo.on_faulty: "
                f"drop); all of them, with reasons, are in {self.path}. The first is row {row}: {problem}"
            )

    def _write(self) -> None:
        with (
            whole(self.path, "name another dataset_prepared_path") as partial,
            # a text may hold what is no UTF-8, which may be what is wrong with it
            partial.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            for found in (self._faulty, self._fatal):
                for name, parts in found.items():
                    for row, problem in _in_order(parts):
                        entry = {"data set": name, "row": row, "problem": problem}
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _count(parts: Sequence[_Faulty]) -> int:
    return sum(len(part.at) for part in parts)


def _in_order(parts: Sequence[_Faulty]) -> Iterator[tuple[int, str]]:
    """(row number, problem) of a data set, by row."""
    return heapq.merge(*(part.pairs() for part in parts))


def _first(parts: Sequence[_Faulty], count: int) -> list[tuple[int, str]]:
    return list(islice(_in_order(parts), count))
